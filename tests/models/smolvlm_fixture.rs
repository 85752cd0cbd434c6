//! Reading the fixtures of `tests/reference/smolvlm.py`.

use lavender_wgpu::data::ImageRef;
use lavender_wgpu::vlm::processor::template::{Message, Part};
use serde_json::Value;

use crate::support::reference;

/// An image of the fixture, shared with Mllama's.
pub fn picture(name: &str) -> image::RgbImage {
    ImageRef::Path(reference(&format!("mllama/images/{name}.png")))
        .open()
        .expect("fixture")
}

/// `expected.json` of a checkpoint.
pub fn expected(name: &str) -> Value {
    let text = std::fs::read_to_string(reference(&format!("smolvlm/{name}/expected.json")))
        .expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

/// A list of whole numbers.
pub fn numbers(json: &Value) -> Vec<u32> {
    serde_json::from_value(json.clone()).expect("a list of numbers")
}

/// A list of strings.
pub fn strings(json: &Value) -> Vec<&str> {
    let list = json.as_array().expect("a list");
    list.iter().map(|v| v.as_str().expect("a string")).collect()
}

/// A case's question with its images, and the answer as the next turn if asked for.
pub fn messages(case: &Value, answered: bool) -> Vec<Message> {
    let text = |key: &str| case[key].as_str().expect("a string").to_string();
    let mut parts = vec![Part::Image; strings(&case["images"]).len()];
    parts.push(Part::Text(text("question")));
    let role = "user".into();
    let mut out = vec![Message { role, parts }];
    if answered {
        out.push(Message::text("assistant", text("answer")));
    }
    out
}
