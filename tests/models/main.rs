//! Whole models against the libraries that published them, on tiny random checkpoints.

#[path = "../support/mod.rs"]
mod support;

mod clip_tokenizer;
mod conversations;
mod ddim;
mod drift;
mod full_size;
mod hostile;
mod idefics3_processor;
mod merge;
mod mllama;
mod mllama_processor;
mod null_text;
mod quantized;
mod resize;
mod shapes;
mod smolvlm;
mod smolvlm_fixture;
mod smolvlm_train;
mod teacher;
mod teacher_fixture;
mod teacher_layouts;
mod teacher_memory;
