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

// Keys that a query row may see because of its place, none for a row past the end.
fn row_visible(p: Params, row: u32) -> u32 {
    let shared_heads = p.heads / p.kv_heads;
    return select(0u, visible_keys(p, row / shared_heads), row < p.queries * shared_heads);
}

// The heads of a query row and of a key, counted from the tensor's first; a row's place in lse and delta.
fn query_head(p: Params, b: u32, kv_head: u32, row: u32) -> u32 {
    let shared_heads = p.heads / p.kv_heads;
    return (b * p.queries + row / shared_heads) * p.heads + kv_head * shared_heads + row % shared_heads;
}
fn key_head(p: Params, b: u32, kv_head: u32, key: u32) -> u32 {
    return (b * p.keys + key) * p.kv_heads + kv_head;
}
fn row_at(p: Params, b: u32, kv_head: u32, row: u32) -> u32 {
    let shared_heads = p.heads / p.kv_heads;
    return (b * p.heads + kv_head * shared_heads + row % shared_heads) * p.queries + row / shared_heads;
}
