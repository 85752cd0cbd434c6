//! Runs that are stopped, mended and gone on with end with the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lavender_wgpu::align::store::failures::{self, Cause};
use lavender_wgpu::align::store::{
    Batch, Layout, Outcome, Planned, TargetOptions, TargetStore, TargetWriter, belongs,
};
use lavender_wgpu::align::words::{Case, words};

use super::{maps, options, provenance, writer};

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

/// A name, and what is done to a store's files.
type Damage<'a> = (&'a str, &'a dyn Fn(&Path));

#[test]
fn damaged_shards_are_found_reported_and_made_again_to_the_same_bytes() {
    let samples = samples(140);
    let bad = ids(&samples, &[2, 70, 130]);
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), Layout::Shards, &samples, 16, &bad, usize::MAX);
    let (first, last) = ("maps-0of1-00000", "maps-0of1-00002");
    let spoil: [Damage; 6] = [
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
