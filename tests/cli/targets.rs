//! `targets` as a job: stopped in every way, on bad samples and full disks, and the page of what it made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use lavender_wgpu::align::store::TargetStore;
use serde_json::{Value, json};

use crate::support::{program, refused, stderr, stdout};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/teacher/b")
}

/// A data set of an image a caption in `dir`; the images differ.
fn data_set(dir: &Path, captions: &[String]) -> PathBuf {
    let entry = |(i, caption): (usize, &String)| {
        let name = format!("{i}.png");
        let picture = RgbImage::from_fn(40, 30, |x, y| {
            Rgb([(x * 6) as u8, (y * 8) as u8, (i * 37 % 256) as u8])
        });
        picture.save(dir.join(&name)).unwrap();
        json!({"id": format!("sample-{i}"), "image": name, "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": caption}]})
    };
    let entries: Vec<Value> = captions.iter().enumerate().map(entry).collect();
    let path = dir.join("data.json");
    fs::write(&path, Value::Array(entries).to_string()).unwrap();
    path
}

/// Captions of one to four words.
fn captions(count: usize) -> Vec<String> {
    let words = ["red", "blue", "circle", "square"];
    (0..count).map(|i| words[..1 + i % 4].join(" ")).collect()
}

/// `targets` of `data` into `out`, cheap.
fn command(data: &Path, out: &Path, extra: &[&str]) -> Command {
    let mut command = program();
    command.args(["targets", "--mode", "noised", "--steps", "1"]);
    command.arg("--diffusion").arg(model());
    command.arg("--data").arg(data);
    command.arg("--out").arg(out).args(extra);
    command
}

fn run(data: &Path, out: &Path, extra: &[&str]) -> Output {
    command(data, out, extra).output().unwrap()
}

fn run_well(data: &Path, out: &Path, extra: &[&str]) -> String {
    let output = run(data, out, extra);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// Every file under `dir` with its bytes.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap().flatten() {
            if item.path().is_dir() {
                folders.push(item.path());
            } else {
                let name = item.path().strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, fs::read(item.path()).unwrap());
            }
        }
    }
    found
}

fn assert_same(found: &Path, expected: &Path) {
    let (found, expected) = (contents(found), contents(expected));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "{name} differs");
    }
}

fn count(dir: &Path, prefix: &str) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|item| item.file_name().to_string_lossy().starts_with(prefix))
        .count()
}

/// A run that gets a signal once its first part is on disk. Gives its exit code, if it had the time for one.
#[cfg(unix)]
fn signalled(mut command: Command, out: &Path, started: &str, signal: &str) -> Option<i32> {
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while count(out, started) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "no {started}");
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before {started}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    child.wait().unwrap().code()
}

#[test]
#[cfg(unix)]
fn a_killed_run_ends_with_the_bytes_of_one_made_in_one_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut captions = captions(30);
    captions[1] = "?!".into();
    let data = data_set(dir.path(), &captions);
    fs::remove_file(dir.path().join("20.png")).unwrap();
    for (layout, started, signals) in [
        (
            "shards",
            "part-",
            vec![("-KILL", None), ("-INT", Some(130))],
        ),
        ("lpm-attention", "0.png", vec![("-KILL", None)]),
    ] {
        let extra = ["--batch", "2", "--quiet", "--layout", layout];
        let whole = dir.path().join(format!("{layout}-whole"));
        run_well(&data, &whole, &extra);
        for (signal, code) in signals {
            let out = dir.path().join(format!("{layout}{signal}"));
            let stopped = signalled(command(&data, &out, &extra), &out, started, signal);
            assert_eq!(stopped, code, "{signal}");
            assert_eq!(
                count(&out, "plan-0of1.json"),
                1,
                "it was stopped in the middle"
            );
            let said = run_well(&data, &out, &extra);
            let made: usize = said.split(' ').next().unwrap().parse().unwrap();
            assert!(made < 28, "nothing was kept: {said}");
            assert_same(&out, &whole);
        }
    }
}

#[test]
fn a_damaged_shard_is_reported_and_made_again_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(dir.path(), &captions(3));
    let (out, whole) = (dir.path().join("out"), dir.path().join("whole"));
    for store in [&out, &whole] {
        run_well(&data, store, &[]);
    }
    let shard = out.join("maps-0of1-00000.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let output = run(&data, &out, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(
        said.contains("made again: ") && said.contains("maps-0of1-00000"),
        "{said}"
    );
    assert_same(&out, &whole);
}

#[test]
fn bad_samples_are_skipped_listed_and_made_once_they_are_good() {
    let dir = tempfile::tempdir().unwrap();
    let mut captions = captions(12);
    captions[3] = "... ?!".into();
    captions[4] = "🎈🎉 🐈‍⬛".into();
    captions[5] = (0..400).map(|i| format!("w{i} ")).collect();
    captions[6] = "🎈 red 🎉".into();
    let data = data_set(dir.path(), &captions);
    let image = |i: usize| dir.path().join(format!("{i}.png"));
    let whole = fs::read(image(8)).unwrap();
    fs::remove_file(image(7)).unwrap();
    fs::write(image(8), &whole[..whole.len() / 2]).unwrap();
    fs::write(image(9), "").unwrap();
    let out = dir.path().join("out");
    let said = run_well(&data, &out, &["--batch", "4"]);
    for part in [
        "7 samples,",
        "0 samples were there already, 5 failed",
        "failed: 3 × image that cannot be read: sample-7, sample-8, sample-9",
        "failed: 2 × text without a word: sample-3, sample-4",
        "failures-0of1.jsonl",
    ] {
        assert!(said.contains(part), "`{part}` in {said}");
    }
    let listed = fs::read_to_string(out.join("failures-0of1.jsonl")).unwrap();
    let listed: Vec<Value> = listed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ids: Vec<&str> = listed.iter().filter_map(|f| f["id"].as_str()).collect();
    assert_eq!(
        ids,
        ["sample-3", "sample-4", "sample-7", "sample-8", "sample-9"]
    );
    let reasons = ["no word", "no word", "No such file", "damaged", "empty"];
    for (failure, reason) in listed.iter().zip(reasons) {
        assert!(
            failure["reason"].as_str().unwrap().contains(reason),
            "{failure}"
        );
    }
    let store = TargetStore::open(&out).unwrap();
    assert_eq!(store.len(), 7);
    let long = store.get("sample-5").unwrap().unwrap();
    assert_eq!(long.words.len(), 400);
    let one = store.get("sample-6").unwrap().unwrap();
    assert_eq!(one.words.len(), 1);
    assert_eq!(one.words[0].spans, [(2, 5)]);

    fs::write(image(8), whole).unwrap();
    let said = run_well(&data, &out, &["--batch", "4"]);
    assert!(
        said.contains("1 samples,") && said.contains("7 samples were there already, 4 failed"),
        "{said}"
    );
    let listed = fs::read_to_string(out.join("failures-0of1.jsonl")).unwrap();
    assert!(
        listed.lines().count() == 4 && !listed.contains("sample-8"),
        "{listed}"
    );
}

#[test]
fn a_run_without_one_good_sample_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(dir.path(), &["...".into(), "?".into()]);
    let out = dir.path().join("out");
    let error = refused(&run(&data, &out, &["--report"]));
    assert!(
        error.contains("none of the 2 samples") && error.contains("sample-0"),
        "{error}"
    );
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("2 × text without a word"));
}

#[test]
fn the_report_shows_what_the_store_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mut captions = captions(30);
    captions[0] = "red <img src=x onerror=alert(1)> circle".into();
    captions[2] = "!".into();
    let data = data_set(dir.path(), &captions);
    for layout in ["shards", "lpm-attention"] {
        let out = dir.path().join(layout);
        run_well(&data, &out, &["--layout", layout]);
        assert!(!out.join("report.html").exists());
        // A second run makes nothing, and the page is made of what is there.
        let said = run_well(&data, &out, &["--layout", layout, "--report"]);
        assert!(
            said.contains("0 samples, 0 word maps") && said.contains("report.html"),
            "{said}"
        );
        let page = fs::read_to_string(out.join("report.html")).unwrap();
        assert!(page.contains("29 of 30 with targets, 1 failed"), "{layout}");
        assert!(
            page.contains("red &lt;img src=x onerror=alert(1)&gt; circle"),
            "{layout}"
        );
        assert!(
            page.contains("1 × text without a word") && page.contains("noised"),
            "{layout}"
        );
        assert_eq!(page.matches("<article>").count(), 24, "{layout}");
        // 24 pictures and the maps of their words, at least one each.
        assert!(
            page.matches("<img src=\"data:image/jpeg;base64,").count() > 2 * 24,
            "{layout}"
        );
        assert_eq!(page.matches("<svg").count(), 2, "{layout}");
    }
    let page = dir.path().join("elsewhere.html");
    run_well(
        &data,
        &dir.path().join("shards"),
        &["--report", page.to_str().unwrap()],
    );
    assert!(page.exists());
}

/// A file system of some KiB in a mount namespace of its own, as the disk of one run.
#[test]
#[cfg(target_os = "linux")]
fn a_disk_that_fills_half_way_keeps_what_was_finished() {
    let allowed = Command::new("unshare").args(["-rm", "true"]).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this system lets no user make a mount namespace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(dir.path(), &captions(12));
    let (disk, kept, whole) = (
        dir.path().join("disk"),
        dir.path().join("kept"),
        dir.path().join("whole"),
    );
    fs::create_dir(&disk).unwrap();
    let extra = ["--batch", "2", "--quiet"];
    run_well(&data, &whole, &extra);
    // What is on the disk when the run ends is copied away, since the disk goes with its namespace.
    let script = "mount -t tmpfs -o size=64k none \"$DISK\" || exit 99; \
                  \"$@\"; code=$?; cp -r \"$DISK\" \"$KEPT\"; exit $code";
    let plain = command(&data, &disk, &extra);
    let output = Command::new("unshare")
        .args(["-rm", "bash", "-c", script, "bash"])
        .arg(plain.get_program())
        .args(plain.get_args())
        .env("DISK", &disk)
        .env("KEPT", &kept)
        .output()
        .unwrap();
    let error = refused(&output);
    assert!(
        error.contains("disk is full")
            && error.contains("part-0of1-00000")
            && error.contains("same command"),
        "{error}"
    );
    assert!(count(&kept, "part-") > 0 && count(&kept, ".writing") == 0);
    let said = run_well(&data, &kept, &extra);
    let made: usize = said.split(' ').next().unwrap().parse().unwrap();
    assert!(made < 12, "nothing was kept: {said}");
    assert_same(&kept, &whole);
}

#[test]
fn parts_made_apart_hold_the_maps_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(dir.path(), &captions(6));
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    // One sample a batch, so that the same kernels make it in both.
    run_well(&data, &whole, &["--batch", "1"]);
    for part in ["0/3", "1/3", "2/3"] {
        run_well(&data, &parts, &["--batch", "1", "--shard", part]);
    }
    let (whole, parts) = (
        TargetStore::open(whole).unwrap(),
        TargetStore::open(parts).unwrap(),
    );
    assert_eq!((whole.len(), parts.len()), (6, 6));
    for i in 0..6 {
        let id = format!("sample-{i}");
        assert_eq!(whole.get(&id).unwrap(), parts.get(&id).unwrap(), "{id}");
    }
}
