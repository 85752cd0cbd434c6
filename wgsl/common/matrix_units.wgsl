#define_import_path matrix_units

// Square cooperative matrices of SIZE², products of Elem that are summed in f32, and rows of FRAGMENTS of them. How many
// subgroups the driver makes of a workgroup is its own affair (AMD's have 32 or 64 threads): kernels deal out work for
// BLOCKS; where there are fewer subgroups they do it in rounds; where there are more, the rest only helps to load.

// A row of shared memory ends with 16 bytes that no one reads: rows start in different banks.
#ifdef HALF
alias Elem = f16;
const PAD = 8u;
#else
alias Elem = f32;
const PAD = 4u;
#endif
#if SIZE == 16
alias AMatrix = coop_mat16x16<Elem, A>;
alias BMatrix = coop_mat16x16<Elem, B>;
alias Sum = coop_mat16x16<f32, C>;
#else
alias AMatrix = coop_mat8x8<Elem, A>;
alias BMatrix = coop_mat8x8<Elem, B>;
alias Sum = coop_mat8x8<f32, C>;
#endif

const SIZE = #{SIZE}u;
const FRAGMENTS = #{FRAGMENTS}u;
const THREADS = #{THREADS}u;
const BLOCKS = 4u;

// A row of matrices; written out, for a matrix that is indexed by a variable may leave the registers.
struct Row {
    s0: Sum,
    s1: Sum,
#if FRAGMENTS == 4
    s2: Sum,
    s3: Sum,
#endif
}

struct Columns {
    b0: BMatrix,
    b1: BMatrix,
#if FRAGMENTS == 4
    b2: BMatrix,
    b3: BMatrix,
#endif
}

fn next_row(row: Row, av: AMatrix, bv: ptr<function, Columns>) -> Row {
    var next: Row;
    next.s0 = coopMultiplyAdd(av, (*bv).b0, row.s0);
    next.s1 = coopMultiplyAdd(av, (*bv).b1, row.s1);
#if FRAGMENTS == 4
    next.s2 = coopMultiplyAdd(av, (*bv).b2, row.s2);
    next.s3 = coopMultiplyAdd(av, (*bv).b3, row.s3);
#endif
    return next;
}
