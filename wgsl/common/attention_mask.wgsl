#define_import_path attention_mask
// Parameters that all attention kernels share, and the order of their query rows.

struct Params {
    queries: u32,
    keys: u32,
    heads: u32,
    kv_heads: u32,
    causal: u32,
    query_offset: u32,
    has_query_bits: u32,
    has_key_bits: u32,
    scale: f32,
    // Taps: rows, columns a sample, batch.
    rows: u32,
    columns: u32,
    batch: u32,
}

// Score and log-sum-exp of nothing: far below any score, yet exp(x − NOTHING) need not overflow.
const NOTHING: f32 = -1e30;

// Keys that a query may see because of its place: all, or those up to its own under a causal mask.
fn visible_keys(p: Params, query: u32) -> u32 {
    return select(p.keys, min(p.keys, query + p.query_offset + 1u), p.causal != 0u);
}

// The first query that may see `key`.
fn first_query(p: Params, key: u32) -> u32 {
    return select(0u, key - min(key, p.query_offset), p.causal != 0u);
}
