//! What the processors of all vision-language families share: pictures, resampling, chat templates,
//! tokens and labels.

pub mod labels;
pub mod resize;
pub mod template;
pub mod tokenizer;
