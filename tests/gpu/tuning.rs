//! The cache of measured choices: kept between runs, left aside where it is of no use.

use std::path::{Path, PathBuf};

use lavender_wgpu::gpu::{Gpu, GpuOptions, Tuned, Tuning};

use crate::support::warnings;

fn open(tuning: Tuning, dir: &Path) -> Gpu {
    Gpu::new(&GpuOptions {
        tuning,
        cache_dir: Some(dir.to_path_buf()),
        ..GpuOptions::default()
    })
    .expect("an adapter")
}

fn tuned() -> Tuned {
    Tuned {
        choice: "rows".into(),
        shape: "1x300x1536x576 nt f32 f32 f32".into(),
        millis: 1.5,
        usual_millis: 2.0,
    }
}

fn written(dir: &Path) -> PathBuf {
    let gpu = open(Tuning::Cached, dir);
    gpu.set_tuned("matmul class", tuned());
    gpu.save_tuning().expect("written").expect("a place")
}

#[test]
fn choices_are_kept_for_the_next_run_unless_it_wants_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(dir.path());
    assert!(path.starts_with(dir.path()), "{}", path.display());
    let again = open(Tuning::Cached, dir.path());
    assert_eq!(again.tuned("matmul class"), Some(tuned()));
    assert_eq!(again.tuned("another"), None);
    assert_eq!(again.tuning_shapes(), [tuned().shape]);
    assert_eq!(open(Tuning::Off, dir.path()).tuned("matmul class"), None);
    assert_eq!(GpuOptions::default().tuning, Tuning::Off);
    // Nothing has changed: nothing is written.
    std::fs::remove_file(&path).unwrap();
    drop(again);
    assert!(!path.exists());
}

#[test]
fn a_cache_of_no_use_is_left_aside_with_one_warning_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(dir.path());
    let good = std::fs::read_to_string(&path).unwrap();
    let driver = open(Tuning::Off, dir.path()).tier().driver.clone();
    let version = format!("\"{}\"", env!("CARGO_PKG_VERSION"));
    let deep = "{\"choices\":".to_string() + &"[".repeat(100_000);
    let bad = [
        (
            "another driver",
            good.replace(&driver, "Vulkan of another year"),
            "driver",
        ),
        (
            "another version",
            good.replace(&version, "\"0.0.0\""),
            "0.0.0",
        ),
        (
            "another format",
            good.replace("\"format\": 1", "\"format\": 2"),
            "format",
        ),
        ("truncated", good[..good.len() / 2].to_string(), "EOF"),
        ("empty", String::new(), "EOF"),
        ("a wrong type", good.replace("1.5", "\"fast\""), "fast"),
        (
            "an unknown field",
            good.replace("\"millis\"", "\"seconds\""),
            "seconds",
        ),
        ("deep", deep, "expected"),
        ("large", " ".repeat(5 << 20), "no tuning cache"),
        ("binary", "\u{0}\u{1}\u{2}".into(), "expected"),
    ];
    for (what, text, told) in bad {
        assert_ne!(text, good, "{what}");
        std::fs::write(&path, &text).unwrap();
        let log = warnings(|| {
            let gpu = open(Tuning::Cached, dir.path());
            assert_eq!(gpu.tuned("matmul class"), None, "{what}");
        });
        assert_eq!(log.matches("left aside").count(), 1, "{what}: {log}");
        assert!(log.contains(told), "{what}: {log}");
        // It was replaced by an empty one of this adapter: no warning any more.
        let replaced = std::fs::read_to_string(&path).unwrap();
        assert!(
            replaced.contains(&driver) && !replaced.contains("matmul class"),
            "{what}"
        );
    }
    // A folder in its place is no cache either, and stays.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(open(Tuning::Cached, dir.path()).tuned("matmul class"), None);
}

#[test]
fn runs_at_the_same_time_keep_what_each_has_found() {
    let dir = tempfile::tempdir().unwrap();
    let runs: Vec<Gpu> = (0..4).map(|_| open(Tuning::Cached, dir.path())).collect();
    std::thread::scope(|threads| {
        for (i, gpu) in runs.iter().enumerate() {
            threads.spawn(move || {
                for j in 0..20 {
                    gpu.set_tuned(&format!("class {i} {j}"), tuned());
                    gpu.save_tuning().expect("written");
                }
            });
        }
    });
    let after = open(Tuning::Cached, dir.path());
    assert_eq!(after.tuning_shapes().len(), 80);
    // What is set anew on purpose replaces what is kept.
    let other = Tuned {
        choice: "tile 4".into(),
        ..tuned()
    };
    runs[0].set_tuned("class 1 1", other.clone());
    runs[0].save_tuning().expect("written");
    let after = open(Tuning::Cached, dir.path());
    assert_eq!(after.tuned("class 1 1"), Some(other));
}

#[test]
fn the_adapter_says_whether_first_use_measures() {
    let dir = tempfile::tempdir().unwrap();
    let gpu = open(Tuning::ByAdapter, dir.path());
    let expected = match gpu.tier().cpu {
        true => Tuning::Cached,
        false => Tuning::FirstUse,
    };
    assert_eq!(gpu.tuning(), expected);
    // Where a run would measure, a new adapter's user is told where that is kept; it can be.
    let measuring = open(Tuning::FirstUse, dir.path());
    let path = measuring.tuning_anew().expect("nothing is kept").to_owned();
    assert!(path.starts_with(dir.path()) && path.exists());
    measuring.set_tuned("matmul class", tuned());
    drop(measuring);
    assert_eq!(open(Tuning::FirstUse, dir.path()).tuning_anew(), None);
    assert_eq!(open(Tuning::Cached, dir.path()).tuning_anew(), None);
}
