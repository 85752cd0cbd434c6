//! The target store: both layouts, damage, and in `runs` stopping and going on.

use std::path::Path;

use lavender_wgpu::align::store::{
    Layout, MapType, Provenance, SIDE, TargetOptions, TargetStore, TargetWriter, belongs,
    hash_of_files,
};
use lavender_wgpu::align::words::{Case, Word, words};

mod runs;

fn options() -> TargetOptions {
    TargetOptions {
        teacher_hash: "00ff".into(),
        mode: "ddim".into(),
        steps: 50,
        layers: "16+32".into(),
        seed: 7,
        case: Case::Lower,
        precision: "f32".into(),
        maps: MapType::F16,
    }
}

fn provenance() -> Provenance {
    Provenance {
        teacher: "t".into(),
        adapter: "a".into(),
        driver: "d".into(),
        version: "0".into(),
    }
}

fn writer(dir: &Path, options: TargetOptions, layout: Layout) -> TargetWriter {
    TargetWriter::create(dir, layout, options, provenance(), (0, 1)).unwrap()
}

/// A smooth bump at another place for each word, so that a mix-up of words or of rows and columns shows.
fn maps(words: &[Word], seed: usize) -> Vec<f32> {
    let mut maps = Vec::new();
    for w in 0..words.len() {
        let (cx, cy) = ((5 * (w + seed)) % 27, (3 * w + 11 * seed) % 30);
        for y in 0..SIDE {
            for x in 0..SIDE {
                let d = (x as f32 - cx as f32).powi(2) + 2.0 * (y as f32 - cy as f32).powi(2);
                maps.push((-d / 40.0).exp());
            }
        }
    }
    maps
}

fn put(writer: &mut TargetWriter, id: &str, caption: &str, seed: usize) {
    let words = words(caption, Case::Lower);
    writer
        .put(
            id,
            Some(&format!("{id}.jpg")),
            caption,
            &words,
            &maps(&words, seed),
        )
        .unwrap();
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}

#[test]
fn shards_round_trip_in_f16_and_u8() {
    // f16 has 11 significant bits below 1, u8 steps of 1/255: half a step each.
    for (maps_as, tolerance) in [(MapType::F16, 0.00025), (MapType::U8, 0.00197)] {
        let dir = tempfile::tempdir().unwrap();
        let mut w = writer(
            dir.path(),
            TargetOptions {
                maps: maps_as,
                ..options()
            },
            Layout::Shards,
        );
        for i in 0..70 {
            put(
                &mut w,
                &format!("s{i}"),
                "a red ball and the BALL’s shadow",
                i,
            );
        }
        put(&mut w, "empty", "", 0);
        w.finish().unwrap();
        let store = TargetStore::open(dir.path()).unwrap();
        assert_eq!(store.len(), 71);
        assert_eq!(store.options().unwrap().steps, 50);
        for i in [0, 63, 64, 69] {
            let found = store.get(&format!("s{i}")).unwrap().unwrap();
            let expected = words("a red ball and the BALL’s shadow", Case::Lower);
            assert_eq!(found.words, expected);
            assert!(largest(&found.maps, &maps(&expected, i)) <= tolerance);
            assert_eq!(found.map_of("red").unwrap(), found.map(1));
            assert_eq!(store.get(&format!("s{i}.jpg")).unwrap().unwrap(), found);
        }
        assert!(store.get("empty").unwrap().unwrap().maps.is_empty());
        assert!(store.get("none").unwrap().is_none());
        assert_eq!(
            store.find("none", Some("s3.jpg")).unwrap().unwrap().id,
            "s3"
        );
    }
}

#[test]
fn an_interrupted_run_goes_on_and_a_shard_without_its_index_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = writer(dir.path(), options(), Layout::Shards);
    put(&mut w, "a", "one cat", 1);
    w.finish().unwrap();
    put(&mut w, "lost", "never flushed", 2);
    drop(w);
    // Left by a run that was killed between a shard and its index.
    std::fs::write(dir.path().join("maps-0of1-00001.safetensors"), b"half").unwrap();

    let mut w = writer(dir.path(), options(), Layout::Shards);
    assert!(w.has("a", None) && !w.has("lost", None));
    put(&mut w, "a", "one cat", 9);
    put(&mut w, "lost", "never flushed", 2);
    w.finish().unwrap();
    let store = TargetStore::open(dir.path()).unwrap();
    assert_eq!(store.len(), 2);
    let expected = maps(&words("one cat", Case::Lower), 1);
    assert!(largest(&store.get("a").unwrap().unwrap().maps, &expected) < 0.00025);
    assert!(store.get("lost").unwrap().is_some());
}

#[test]
fn changed_options_are_refused_by_name() {
    for layout in [Layout::Shards, Layout::Published] {
        let dir = tempfile::tempdir().unwrap();
        let mut w = writer(dir.path(), options(), layout);
        put(&mut w, "a", "one cat", 1);
        w.finish().unwrap();
        let changed = TargetOptions {
            steps: 20,
            seed: 8,
            precision: "f16".into(),
            ..options()
        };
        drop(w);
        let error =
            TargetWriter::create(dir.path(), layout, changed, provenance(), (0, 1)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("steps was 50, now 20") && text.contains("seed was 7, now 8"),
            "{text}"
        );
        assert!(
            text.contains("precision was \"f32\", now \"f16\""),
            "{text}"
        );
        assert!(!text.contains("mode"), "{text}");
    }
}

#[test]
fn damage_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = writer(dir.path(), options(), Layout::Shards);
    put(&mut w, "a", "one cat", 1);
    put(&mut w, "b", "two dogs", 2);
    w.finish().unwrap();
    let shard = dir.path().join("maps-0of1-00000.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    let message = |bytes: &[u8], key: &str| {
        std::fs::write(&shard, bytes).unwrap();
        TargetStore::open(dir.path())
            .unwrap()
            .get(key)
            .unwrap_err()
            .to_string()
    };
    let cut = message(&whole[..whole.len() - 7], "a");
    assert!(
        cut.contains("maps-0of1-00000.safetensors") && cut.contains("targets"),
        "{cut}"
    );
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let bit = message(&flipped, "b");
    assert!(bit.contains("`b`") && bit.contains("checksum"), "{bit}");
    std::fs::remove_file(&shard).unwrap();
    let gone = TargetStore::open(dir.path())
        .unwrap()
        .get("a")
        .unwrap_err()
        .to_string();
    assert!(gone.contains("maps-0of1-00000.safetensors"), "{gone}");

    std::fs::write(dir.path().join("maps-0of1-00001.jsonl"), "{\"id\": 3}\n").unwrap();
    let index = TargetStore::open(dir.path()).unwrap_err().to_string();
    assert!(
        index.contains("maps-0of1-00001.jsonl") && index.contains("line 1"),
        "{index}"
    );
}

#[test]
fn the_published_layout_is_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let caption = "the small dog";
    let mut w = writer(dir.path(), options(), Layout::Published);
    put(&mut w, "1000092795", caption, 3);
    w.finish().unwrap();
    assert!(w.has("x", Some("1000092795.jpg")));
    let file = dir
        .path()
        .join("1000092795.jpg/lpm_attention/1000092795/attention_dog.jpg");
    let jpeg = image::open(&file).unwrap();
    assert_eq!(
        (jpeg.width(), jpeg.height(), jpeg.color()),
        (32, 32, image::ColorType::L8)
    );

    let store = TargetStore::open(dir.path()).unwrap();
    let found = store
        .find("some id", Some("1000092795.jpg"))
        .unwrap()
        .unwrap();
    let names: Vec<_> = found.words.iter().map(|w| w.text.as_str()).collect();
    assert_eq!(names, ["dog", "small", "the"]);
    let original = words(caption, Case::Lower);
    let expected = maps(&original, 3);
    for (i, word) in original.iter().enumerate() {
        let expected = &expected[i * SIDE * SIDE..(i + 1) * SIDE * SIDE];
        // Quality 98: a few gray levels.
        assert!(largest(found.map_of(&word.text).unwrap(), expected) < 4.0 / 255.0);
    }
    drop(w);
    // The published sets come without our record, and are not ours to go on with.
    std::fs::remove_file(dir.path().join("targets.json")).unwrap();
    assert!(TargetStore::open(dir.path()).unwrap().options().is_none());
    let create = |layout| {
        let made = TargetWriter::create(dir.path(), layout, options(), provenance(), (0, 1));
        made.unwrap_err().to_string()
    };
    assert!(create(Layout::Published).contains("nobody knows which options"));

    image::GrayImage::new(16, 16).save(&file).unwrap();
    let error = TargetStore::open(dir.path())
        .unwrap()
        .get("1000092795.jpg")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("attention_dog.jpg") && error.contains("16×16") && error.contains("32×32"),
        "{error}"
    );
}

#[test]
fn nothing_to_open_is_an_error_that_says_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let error = TargetStore::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("maps-*.jsonl") && error.contains("lpm_attention"),
        "{error}"
    );
    let error = TargetStore::open(dir.path().join("missing"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn parts_cover_every_sample_once_and_can_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut sizes = Vec::new();
    for part in 0..3 {
        let mut w = TargetWriter::create(
            dir.path(),
            Layout::Shards,
            options(),
            provenance(),
            (part, 3),
        )
        .unwrap();
        let mine: Vec<_> = (0..90)
            .map(|i| format!("id{i}"))
            .filter(|id| belongs(id, (part, 3)))
            .collect();
        for id in &mine {
            put(&mut w, id, "cat", 1);
        }
        w.finish().unwrap();
        sizes.push(mine.len());
    }
    assert_eq!(sizes.iter().sum::<usize>(), 90);
    // A fair hash gives 30 ± 4.5 each; a part under 15 would be a broken split.
    assert!(sizes.iter().all(|&n| n >= 15), "{sizes:?}");
    assert_eq!(TargetStore::open(dir.path()).unwrap().len(), 90);
}

#[test]
fn teacher_hash_depends_on_names_and_content() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let a = hash_of_files(&[file("a", "x")]).unwrap();
    assert_eq!(a.len(), 16);
    assert_ne!(a, hash_of_files(&[file("b", "x")]).unwrap());
    assert_ne!(a, hash_of_files(&[file("a", "y")]).unwrap());
}
