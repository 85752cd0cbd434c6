//! Reading benchmarks.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{Rgb, RgbImage};
use lavender_wgpu::data::ImageRef;
use lavender_wgpu::eval::Benchmark;
use lavender_wgpu::eval::item::{Item, drawn, load};

use crate::support::reference;

fn picture() -> String {
    STANDARD.encode(fs::read(reference("mllama/images/tiny.png")).unwrap())
}

fn tsv(dir: &Path, text: &str) -> std::path::PathBuf {
    let path = dir.join("data.tsv");
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn tsv_rows_are_read_with_quotes_options_lists_and_shared_images() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "\u{feff}index\tquestion\thint\tA\tB\tC\tanswer\tcategory\tsplit\timage\n\
         7\t\"What \"\"is\"\"\nit?\"\tlook\tcat\tdog\t\tB\tanimals\tdev\t{image}\n\
         8\tAnd here?\t\t\t\t\t\"['a dog', 'dog']\"\t\t\t7\n\
         9\tWhere?\t\tx\ty\tz\tA\t\t\t99\n\
         10\tTwo?\t\tx\ty\t\tA\t\t\t\"['{image}', '{image}']\"\n\
         11\tNone?\t\tx\ty\t\tA\t\t\t\n\
         12\tBroken?\t\tx\ty\t\tA\t\t\t{broken}\n",
        image = picture(),
        broken = "%".repeat(80),
    );
    let (items, skipped) = load(&tsv(dir.path(), &text), None).unwrap();
    assert_eq!(items.len(), 2);
    let first = &items[0];
    assert_eq!((first.index.as_str(), first.number), ("7", 0));
    assert_eq!(first.question, "What \"is\"\nit?");
    assert_eq!(first.options, [('A', "cat".into()), ('B', "dog".into())]);
    assert_eq!(
        first.turns[0].text(),
        "Hint: look\nQuestion: What \"is\"\nit?\nOptions:\nA. cat\nB. dog\nAnswer with the letter of the correct option."
    );
    let (category, split) = (first.category.as_deref(), first.split.as_deref());
    assert_eq!((category, split), (Some("animals"), Some("dev")));
    assert_eq!(first.image.open().unwrap().dimensions(), (3, 5));
    // Row 8 has row 7's image, two answers, no options, and asks its question as it is.
    assert_eq!(items[1].image.open().unwrap().dimensions(), (3, 5));
    assert_eq!(items[1].answers, ["a dog", "dog"]);
    assert_eq!(items[1].turns[0].text(), "And here?");
    assert!(items[1].options.is_empty() && items[1].category.is_none());
    let reasons = [
        "no row with index `99`",
        "2 images",
        "no image",
        "not base64",
    ];
    assert_eq!(skipped.len(), reasons.len());
    for (one, wanted) in skipped.iter().zip(reasons) {
        assert!(one.reason.contains(wanted), "{one:?}");
    }
}

#[test]
fn image_paths_are_below_the_images_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = tsv(dir.path(), "question\tanswer\timage_path\nq\ta\tx/y.png\n");
    let (items, _) = load(&path, Some(Path::new("/pictures"))).unwrap();
    assert_eq!(items[0].image, ImageRef::Path("/pictures/x/y.png".into()));
    assert_eq!(items[0].index, "0");
    let (items, _) = load(&path, None).unwrap();
    assert_eq!(items[0].image, ImageRef::Path(dir.path().join("x/y.png")));
}

#[test]
fn tables_that_are_no_benchmark_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (text, parts) in [
        (
            "index\tquestion\timage\n1\tq\tx\n",
            ["column `answer`: missing", "`question`"],
        ),
        (
            "question\tanswer\nq\ta\n",
            ["column `image`: missing", "found `question`, `answer`"],
        ),
        (
            "question\tanswer\timage\nq\ta\n",
            ["line 2", "2 columns found, 3 expected"],
        ),
        ("question\tanswer\timage\n", ["no rows", "data.tsv"]),
        ("", ["column `image`", "missing"]),
    ] {
        let error = load(&tsv(dir.path(), text), None).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
    }
    fs::write(
        dir.path().join("data.tsv"),
        b"question\tanswer\timage\n\xff\ta\tb\n",
    )
    .unwrap();
    let error = load(&dir.path().join("data.tsv"), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("UTF-8") || error.contains("utf-8"),
        "{error}"
    );
    let error = load(&dir.path().join("none.tsv"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("none.tsv"), "{error}");
}

#[test]
fn conversations_become_questions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let turn =
        |role: &str, text: &str| format!("{{\"role\": \"{role}\", \"content\": \"{text}\"}}");
    let line = format!(
        "{{\"id\": \"a\", \"image\": \"a.png\", \"messages\": [{}, {}, {}, {}]}}",
        turn("user", "<image>\\nWhat?"),
        turn("assistant", "A dog."),
        turn("user", "Which?\\nA. big\\nB. small"),
        turn("assistant", "B"),
    );
    fs::write(&path, line).unwrap();
    let (items, skipped) = load(&path, None).unwrap();
    let mut item = items[0].clone();
    assert!(skipped.is_empty());
    assert_eq!(
        (item.turns.len(), item.answers.as_slice()),
        (3, &["B".to_owned()][..])
    );
    assert_eq!(item.options, [('A', "big".into()), ('B', "small".into())]);
    item.instruct("Only a letter.");
    assert_eq!(
        item.turns[2].text(),
        "Which?\nA. big\nB. small\nOnly a letter."
    );
    assert_eq!(item.turns[0].text(), "What?");
    assert_eq!(item.sample().turns.len(), 4);
}

#[test]
fn the_data_s_shape_chooses_the_benchmark() {
    let plain = &drawn(None).unwrap()[0];
    let item = |answer: &str, options: &[&str]| {
        let letters = ('A'..).zip(options.iter().map(|o| (*o).to_owned()));
        Item {
            answers: vec![answer.to_owned()],
            options: letters.collect(),
            ..plain.clone()
        }
    };
    let caption = "A red circle is left of a square";
    for (items, wanted) in [
        (
            vec![item("B", &["x", "y"]), item("x", &["x", "y"])],
            Benchmark::MultipleChoice,
        ),
        (vec![item("Yes.", &[]), item("no", &[])], Benchmark::YesNo),
        (vec![item("yes", &[]), item("red", &[])], Benchmark::Vqa),
        (
            vec![item(caption, &[]), item(caption, &[]), item("red", &[])],
            Benchmark::Caption,
        ),
    ] {
        assert_eq!(Benchmark::fitting(&items).0, wanted);
    }
    assert_eq!(Benchmark::fitting(&drawn(None).unwrap()).0, Benchmark::Vqa);
}

#[test]
fn masks_become_regions_of_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let mut item = drawn(None).unwrap()[0].clone();
    item.index = "x".into();
    fs::create_dir(dir.path().join("x")).unwrap();
    // The left half is inside.
    let mask = RgbImage::from_fn(64, 48, |x, _| Rgb([if x < 32 { 255 } else { 0 }; 3]));
    mask.save(dir.path().join("x/Circle.png")).unwrap();
    item.read_regions(dir.path()).unwrap();
    let [(word, cells)] = &item.regions[..] else {
        panic!("{:?}", item.regions)
    };
    assert_eq!((word.as_str(), cells.len()), ("circle", 1024));
    assert!((0..1024).all(|i| cells[i] == (i % 32 < 16)));
    // A sample without masks has none; a name cannot leave the folder.
    for index in ["y", "../x", ".."] {
        let mut other = Item {
            index: index.into(),
            regions: Vec::new(),
            ..item.clone()
        };
        other.read_regions(dir.path()).unwrap();
        assert!(other.regions.is_empty());
    }
}
