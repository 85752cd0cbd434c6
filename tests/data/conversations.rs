//! Data set files in both formats, and what is wrong with bad ones.

use std::path::Path;

use lavender_wgpu::data::{DataSet, ImageRef, Part, Role, Turn};

fn load(name: &str, text: &str) -> Result<DataSet, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    DataSet::load(&path, Some(Path::new("pictures"))).map_err(|e| e.to_string())
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

#[test]
fn llava_json_turns_the_image_line_into_a_part() {
    let set = load(
        "data.json",
        r#"[
        {"id": "a", "image": "x/1.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "And <image> here?"}, {"from": "gpt", "value": "A dog."}]},
        {"image": "2.jpg", "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A hat."}]},
        {"id": 17, "image": "/abs/3.jpg", "conversations": [
            {"from": "human", "value": "Describe."}, {"from": "gpt", "value": "A mat."}]}
        ]"#,
    )
    .unwrap();
    let [a, b, c] = &set.samples[..] else {
        panic!()
    };
    assert_eq!(
        (a.id.as_str(), &a.image),
        ("a", &ImageRef::Path("pictures/x/1.jpg".into()))
    );
    assert_eq!(a.image.file_name(), "1.jpg");
    assert_eq!(
        a.turns[0],
        Turn {
            role: Role::User,
            parts: vec![Part::Image, text("What is it?")]
        }
    );
    assert_eq!(a.turns[2].parts, [text("And <image> here?")]);
    assert_eq!(a.answer(), "A cat. A dog.");
    assert_eq!(b.id, "1");
    assert_eq!(b.turns[1].parts, [text("What is it?"), Part::Image]);
    assert_eq!(
        (c.id.as_str(), &c.image),
        ("17", &ImageRef::Path("/abs/3.jpg".into()))
    );
    assert_eq!(c.turns[0].parts, [Part::Image, text("Describe.")]);
}

#[test]
fn jsonl_messages_take_the_image_from_either_place() {
    let set = load(
        "data.jsonl",
        concat!(
            r#"{"id":"p","messages":[{"role":"user","content":[{"type":"text","text":"Look:"},"#,
            r#"{"type":"image","image":"1.png"},{"type":"text","text":" what?"}]},"#,
            r#"{"role":"assistant","content":[{"type":"text","text":"A cat."}]}]}"#,
            "\n\n",
            r#"{"id":"q","images":["2.png"],"messages":[{"role":"user","content":"<image>What?"},"#,
            r#"{"role":"assistant","content":"A dog."}]}"#,
            "\n"
        ),
    )
    .unwrap();
    assert_eq!(
        set.samples[0].turns[0].parts,
        [text("Look:"), Part::Image, text(" what?")]
    );
    assert_eq!(
        set.samples[0].image,
        ImageRef::Path("pictures/1.png".into())
    );
    assert_eq!(set.samples[1].turns[0].parts, [Part::Image, text("What?")]);
    assert_eq!(
        set.samples[1].image,
        ImageRef::Path("pictures/2.png".into())
    );
    assert_eq!(set.samples[1].answer(), "A dog.");
}

#[test]
fn images_are_beside_the_file_by_default() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    let line = r#"{"image":"1.png","messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
    std::fs::write(&path, line).unwrap();
    let set = DataSet::load(&path, None).unwrap();
    assert_eq!(
        set.samples[0].image,
        ImageRef::Path(dir.path().join("1.png"))
    );
}

#[test]
fn every_bad_entry_is_named_with_its_place_and_field() {
    let entry = |body: &str| format!("{{\"image\":\"i.png\",\"messages\":[{body}]}}");
    let user = r#"{"role":"user","content":"q"}"#;
    let answer = r#"{"role":"assistant","content":"a"}"#;
    let good = entry(&format!("{user},{answer}"));
    let cases: Vec<(&str, String, &[&str])> = vec![
        (
            "a.jsonl",
            format!("{good}\n{{oops"),
            &["a.jsonl", "line 2", "JSON"],
        ),
        (
            "a.json",
            "[{\"image\":\n 1,}]".into(),
            &["a.json", "line 2", "JSON"],
        ),
        ("a.json", "[3]".into(), &["entry 0", "found 3", "an object"]),
        (
            "a.json",
            "[{\"image\":\"i\"}]".into(),
            &["entry 0", "conversations", "messages"],
        ),
        (
            "a.json",
            r#"[{"image":"i","conversations":[{"from":"robot","value":"x"}]}]"#.into(),
            &["conversations[0].from", "robot", "`human`"],
        ),
        (
            "a.json",
            r#"[{"image":"i","conversations":[{"from":"human","value":7}]}]"#.into(),
            &["conversations[0].value", "found 7", "a text"],
        ),
        (
            "a.jsonl",
            format!("{{\"messages\":[{user},{answer}]}}"),
            &["line 1", "field `image`", "found nothing"],
        ),
        ("a.jsonl", entry(user), &["line 1", "assistant's turn"]),
        ("a.jsonl", entry(answer), &["line 1", "user's turn"]),
        (
            "a.jsonl",
            entry(&format!(
                "{user},{{\"role\":\"assistant\",\"content\":\"  \"}}"
            )),
            &["line 1", "empty", "caption"],
        ),
        (
            "a.jsonl",
            entry(&format!(
                "{{\"role\":\"user\",\"content\":[{{\"type\":\"video\"}}]}},{answer}"
            )),
            &["messages[0].content[0].type", "video", "`image`"],
        ),
        (
            "a.jsonl",
            entry(&format!(
                "{{\"role\":\"user\",\"content\":[{{\"type\":\"image\"}},{{\"type\":\"image\"}}]}},{answer}"
            )),
            &["2 image parts", "one"],
        ),
        (
            "a.jsonl",
            entry(&format!(
                "{{\"role\":\"user\",\"content\":[{{\"type\":\"image\",\"url\":\"https://e.org/x.png\"}}]}},{answer}"
            )),
            &["messages[0].content[0]", "local file"],
        ),
        (
            "a.jsonl",
            format!(
                "{good}\n{}",
                good.replace("{\"image\"", "{\"id\":\"0\",\"image\"")
            ),
            &["field `id`", "`0`", "twice"],
        ),
        ("a.jsonl", "\n\n".into(), &["no samples"]),
        ("a.json", "[]".into(), &["no samples"]),
        (
            "a.parquet",
            "PAR1".into(),
            &["a.parquet", "not a whole parquet file"],
        ),
        ("a.tar", String::new(), &["a.tar", "cut off"]),
        (
            "a.json",
            r#"{"images":[],"dataset":"flickr30k"}"#.into(),
            &["no samples"],
        ),
        (
            "a.json",
            "{\n\"a\": 1\n}".into(),
            &["one JSON object", "array"],
        ),
    ];
    for (name, content, wanted) in cases {
        let error = load(name, &content).expect_err(&content);
        for part in wanted {
            assert!(
                error.contains(part),
                "{content}\n gave `{error}`,\n expected `{part}` in it"
            );
        }
        assert!(!error.contains('\n'), "more than one line: {error}");
    }
}

#[test]
fn an_epochs_order_depends_on_seed_and_epoch_alone() {
    let line = |i: usize| {
        format!(
            "{{\"id\":{i},\"image\":\"i\",\"messages\":[{{\"role\":\"user\",\"content\":\"q\"}},\
             {{\"role\":\"assistant\",\"content\":\"a\"}}]}}\n"
        )
    };
    let set = load("a.jsonl", &(0..50).map(line).collect::<String>()).unwrap();
    let order = set.order(1, 0, true);
    assert_eq!(order, set.order(1, 0, true));
    assert_ne!(order, set.order(1, 1, true));
    assert_ne!(order, set.order(2, 0, true));
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, set.order(1, 0, false));
    assert_ne!(sorted, order);
    // The same on every machine and in every version: resumed runs depend on it.
    assert_eq!(&order[..5], &[45, 8, 25, 43, 40]);
}
