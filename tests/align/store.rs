//! The target store: both layouts, interruption, damage.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lavender_wgpu::align::store::failures::{self, Cause};
use lavender_wgpu::align::store::{
    Batch, Layout, MapType, Outcome, Planned, Provenance, SIDE, TargetOptions, TargetStore,
    TargetWriter, belongs, hash_of_files,
};
use lavender_wgpu::align::words::{Case, Word, words};

fn options() -> TargetOptions {
    TargetOptions {
        teacher_hash: "00ff".into(),
        mode: "ddim".into(),
        steps: 50,
        layers: "16+32".into(),
        seed: 7,
        case: Case::Lower,
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

/// Samples of a run; each third has two words, and ids are in no order.
fn samples(count: usize) -> Vec<Planned> {
    (0..count)
        .map(|i| Planned {
            id: format!("s{}", i * 37 % 1009),
            image: Some(format!("{i}.jpg")),
            caption: if i % 3 == 0 { "two cats" } else { "dog" }.into(),
        })
        .collect()
}

/// What a teacher would say of a sample: maps by its id, or a failure where `bad` has it.
fn outcome(sample: &Planned, bad: &BTreeSet<String>) -> Outcome {
    if bad.contains(&sample.id) {
        return Outcome::Failed {
            cause: Cause::Image,
            reason: format!("{}: no such file", sample.id),
        };
    }
    let words = words(&sample.caption, Case::Lower);
    let seed = sample.id[1..].parse().unwrap();
    Outcome::Made {
        maps: maps(&words, seed),
        words,
    }
}

fn ids(samples: &[Planned], places: &[usize]) -> BTreeSet<String> {
    places.iter().map(|&i| samples[i].id.clone()).collect()
}

/// A run of at most `most` batches; gives what it planned and what damage it found.
fn run(
    dir: &Path,
    layout: Layout,
    samples: &[Planned],
    batch: usize,
    bad: &BTreeSet<String>,
    most: usize,
) -> (Vec<Batch>, Vec<String>) {
    let mut w = writer(dir, options(), layout);
    let damage = w.damaged().map(str::to_owned).collect();
    let batches = w.plan(samples.to_vec(), batch).unwrap();
    for batch in batches.iter().take(most) {
        let places = batch.samples.iter();
        let outcomes = places.map(|&i| outcome(&samples[i], bad)).collect();
        w.write(batch, outcomes).unwrap();
    }
    if most >= batches.len() {
        w.finish().unwrap();
    }
    (batches, damage)
}

/// Every file under `dir` with its bytes.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in std::fs::read_dir(folder).unwrap().flatten() {
            let path = item.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn assert_same(found: &Path, expected: &Path, what: &str) {
    let (found, expected) = (contents(found), contents(expected));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "{what}");
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "{what}: {name} differs");
    }
}

#[test]
fn a_run_stopped_after_any_batch_ends_with_the_same_bytes() {
    for (layout, count, bad) in [
        (Layout::Shards, 140usize, vec![3, 64, 65, 66, 139]),
        (Layout::Published, 33, vec![3, 18, 19, 20, 32]),
    ] {
        let batch = count.div_ceil(16);
        let samples = samples(count);
        let bad = ids(&samples, &bad);
        let whole = tempfile::tempdir().unwrap();
        let (batches, _) = run(whole.path(), layout, &samples, batch, &bad, usize::MAX);
        let planned: usize = batches.iter().map(|batch| batch.samples.len()).sum();
        assert_eq!(planned, count);
        // Before the first, in the middle of a shard, at its end and between shards, after the last.
        let last = batches.len();
        for stop in [0, 1, 2, 7, 8, last - 1, last] {
            let stop = stop.min(last);
            let dir = tempfile::tempdir().unwrap();
            run(dir.path(), layout, &samples, batch, &bad, stop);
            // As a kill in the middle of a write leaves it.
            std::fs::write(dir.path().join(".writing-abc.tmp"), "half").unwrap();
            let (left, _) = run(dir.path(), layout, &samples, batch, &bad, usize::MAX);
            let left: usize = left.iter().map(|batch| batch.samples.len()).sum();
            let done: usize = batches[..stop].iter().map(|b| b.samples.len()).sum();
            // Failures of the published layout are tried again with the rest of a run.
            let again =
                bad.len() * usize::from(layout == Layout::Published || stop == batches.len());
            assert!(
                left <= planned - done + again,
                "{left} left of {planned}, {done} done"
            );
            assert_same(
                dir.path(),
                whole.path(),
                &format!("{layout:?} stopped after {stop}"),
            );
        }
        // Nothing of a run's own stays; one file lists the failures, sorted.
        let names: Vec<String> = contents(whole.path()).into_keys().collect();
        assert!(
            !names
                .iter()
                .any(|n| n.starts_with("pa") || n.starts_with('.') || n.starts_with("plan"))
        );
        let listed = failures::read_all(whole.path()).unwrap();
        let listed: Vec<&String> = listed.iter().map(|failure| &failure.id).collect();
        assert_eq!(listed, bad.iter().collect::<Vec<_>>());
    }
}

#[test]
fn failures_are_tried_again_and_leave_the_list_when_they_succeed() {
    let samples = samples(70);
    let bad = ids(&samples, &[0, 5, 69]);
    for layout in [Layout::Shards, Layout::Published] {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), layout, &samples, 9, &bad, usize::MAX);
        let before = contents(dir.path());
        let (again, _) = run(dir.path(), layout, &samples, 9, &bad, usize::MAX);
        let again: Vec<usize> = again.into_iter().flat_map(|batch| batch.samples).collect();
        assert_eq!(again, [0, 5, 69]);
        assert!(
            contents(dir.path()) == before,
            "a fruitless second try changed the store"
        );

        run(
            dir.path(),
            layout,
            &samples,
            4,
            &ids(&samples, &[5]),
            usize::MAX,
        );
        let listed = failures::read_all(dir.path()).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (listed[0].id.as_str(), listed[0].cause),
            (samples[5].id.as_str(), Cause::Image)
        );
        run(
            dir.path(),
            layout,
            &samples,
            4,
            &BTreeSet::new(),
            usize::MAX,
        );
        assert!(failures::read_all(dir.path()).unwrap().is_empty());
        assert_eq!(TargetStore::open(dir.path()).unwrap().len(), 70);
    }
}

#[test]
fn damaged_shards_are_found_reported_and_made_again_to_the_same_bytes() {
    let samples = samples(140);
    let bad = ids(&samples, &[2, 70, 130]);
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), Layout::Shards, &samples, 16, &bad, usize::MAX);
    let (first, last) = ("maps-0of1-00000", "maps-0of1-00002");
    let spoil: [(&str, &dyn Fn(&Path)); 6] = [
        ("cut", &|dir| {
            let shard = dir.join(format!("{first}.safetensors"));
            let bytes = std::fs::read(&shard).unwrap();
            std::fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
        }),
        ("one bit", &|dir| {
            let shard = dir.join(format!("{first}.safetensors"));
            let mut bytes = std::fs::read(&shard).unwrap();
            *bytes.last_mut().unwrap() ^= 4;
            std::fs::write(&shard, bytes).unwrap();
        }),
        ("no shard", &|dir| {
            std::fs::remove_file(dir.join(format!("{first}.safetensors"))).unwrap();
        }),
        ("empty shard", &|dir| {
            std::fs::write(dir.join(format!("{first}.safetensors")), "").unwrap();
        }),
        ("a tensor is missing", &|dir| {
            // Another shard's file under this one's name.
            let (from, to) = (
                format!("{last}.safetensors"),
                format!("{first}.safetensors"),
            );
            std::fs::copy(dir.join(from), dir.join(to)).unwrap();
        }),
        ("index spoilt", &|dir| {
            std::fs::write(dir.join(format!("{first}.jsonl")), "{\"id\": 3}\n").unwrap();
        }),
    ];
    for (what, spoil) in spoil {
        // Alone, and together with a short shard and a stop in the middle of mending.
        for (other, stop) in [(false, usize::MAX), (true, 2)] {
            let dir = tempfile::tempdir().unwrap();
            run(dir.path(), Layout::Shards, &samples, 16, &bad, usize::MAX);
            spoil(dir.path());
            if other {
                std::fs::write(dir.path().join(format!("{last}.safetensors")), "x").unwrap();
            }
            let (batches, damage) = run(dir.path(), Layout::Shards, &samples, 16, &bad, stop);
            assert_eq!(damage.len(), 1 + usize::from(other), "{what}: {damage:?}");
            assert!(damage[0].contains(first), "{what}: {damage:?}");
            let planned: usize = batches.iter().map(|batch| batch.samples.len()).sum();
            // The shards' own 64 and 12 samples, and the failures of whole shards.
            assert_eq!(planned, if other { 64 + 12 + 1 } else { 64 + 2 }, "{what}");
            let (_, damage) = run(dir.path(), Layout::Shards, &samples, 16, &bad, usize::MAX);
            assert!(damage.is_empty(), "{what}: {damage:?}");
            assert_same(dir.path(), whole.path(), what);
        }
    }
}

#[test]
fn a_damaged_image_of_the_published_layout_is_made_again() {
    let (dir, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let samples = samples(10);
    let none = BTreeSet::new();
    for dir in [&dir, &whole] {
        run(
            dir.path(),
            Layout::Published,
            &samples,
            3,
            &none,
            usize::MAX,
        );
    }
    let spoilt = dir.path().join("4.jpg/lpm_attention/4/attention_dog.jpg");
    std::fs::write(&spoilt, "x").unwrap();
    let (batches, _) = run(
        dir.path(),
        Layout::Published,
        &samples,
        3,
        &none,
        usize::MAX,
    );
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].samples, [4]);
    assert_same(dir.path(), whole.path(), "mended");
}

#[test]
fn a_changed_data_set_keeps_what_is_still_right() {
    let dir = tempfile::tempdir().unwrap();
    let mut samples = samples(100);
    let none = BTreeSet::new();
    let (batches, _) = run(dir.path(), Layout::Shards, &samples, 10, &none, 3);
    let written: Vec<usize> = batches[..3]
        .iter()
        .flat_map(|b| b.samples.clone())
        .collect();
    // One of the written samples has another text now, one is gone, and there are new ones.
    samples[written[4]].caption = "a bird".into();
    samples.remove(written[7]);
    samples.extend(self::samples(110).split_off(100));
    let (batches, _) = run(dir.path(), Layout::Shards, &samples, 10, &none, usize::MAX);
    let planned: usize = batches.iter().map(|batch| batch.samples.len()).sum();
    assert_eq!(planned, samples.len() - 28);
    let store = TargetStore::open(dir.path()).unwrap();
    assert_eq!(store.len(), samples.len());
    for sample in &samples {
        let found = store.get(&sample.id).unwrap().unwrap();
        assert_eq!(found.caption, sample.caption);
    }
    // New samples alone are added in a shard of their own.
    let before = contents(dir.path());
    samples.extend(self::samples(113).split_off(110));
    let (batches, _) = run(dir.path(), Layout::Shards, &samples, 10, &none, usize::MAX);
    assert_eq!(batches.len(), 1);
    let after = contents(dir.path());
    assert_eq!(after.len(), before.len() + 2);
    assert!(before.iter().all(|(name, bytes)| after[name] == *bytes));
}

#[test]
fn a_second_run_of_the_same_part_is_refused_while_the_first_lives() {
    let dir = tempfile::tempdir().unwrap();
    let first = writer(dir.path(), options(), Layout::Shards);
    let create = |part| {
        TargetWriter::create(dir.path(), Layout::Shards, options(), provenance(), part)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let error = create((0, 1)).unwrap_err();
    assert!(
        error.contains("another run is writing `--shard 0/1`"),
        "{error}"
    );
    create((0, 2)).unwrap();
    drop(first);
    create((0, 1)).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_union_of_three_parts_is_the_whole() {
    let samples = samples(150);
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let none = BTreeSet::new();
    run(whole.path(), Layout::Shards, &samples, 7, &none, usize::MAX);
    for part in 0..3 {
        let mine: Vec<Planned> = samples
            .iter()
            .filter(|sample| belongs(&sample.id, (part, 3)))
            .cloned()
            .collect();
        let mut w = TargetWriter::create(
            parts.path(),
            Layout::Shards,
            options(),
            provenance(),
            (part, 3),
        )
        .unwrap();
        for batch in w.plan(mine.clone(), 7).unwrap() {
            let places = batch.samples.iter();
            let outcomes = places.map(|&i| outcome(&mine[i], &none)).collect();
            w.write(&batch, outcomes).unwrap();
        }
        w.finish().unwrap();
    }
    let (whole, parts) = (
        TargetStore::open(whole.path()).unwrap(),
        TargetStore::open(parts.path()).unwrap(),
    );
    assert_eq!((whole.len(), parts.len()), (150, 150));
    for sample in &samples {
        assert_eq!(
            whole.get(&sample.id).unwrap(),
            parts.get(&sample.id).unwrap()
        );
    }
}

#[test]
fn the_other_layout_and_an_unfinished_store_are_named() {
    for (layout, other, part) in [
        (Layout::Shards, Layout::Published, "safetensors shards"),
        (Layout::Published, Layout::Shards, "lpm_attention layout"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        run(
            dir.path(),
            layout,
            &samples(3),
            1,
            &BTreeSet::new(),
            usize::MAX,
        );
        let created = TargetWriter::create(dir.path(), other, options(), provenance(), (0, 1));
        let error = created.unwrap_err().to_string();
        assert!(
            error.contains(part) && error.contains("another --out"),
            "{error}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    run(
        dir.path(),
        Layout::Shards,
        &samples(3),
        1,
        &BTreeSet::new(),
        1,
    );
    let error = TargetStore::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("has not finished a shard"), "{error}");
    let changed = TargetOptions {
        layers: "daam".into(),
        ..options()
    };
    let created = TargetWriter::create(dir.path(), Layout::Shards, changed, provenance(), (0, 1));
    let error = created.unwrap_err().to_string();
    assert!(
        error.contains("layers was \"16+32\", now \"daam\""),
        "{error}"
    );
}
