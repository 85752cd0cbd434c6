//! The cache of measured choices: kept between runs, left aside where it is of no use.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lavender_wgpu::gpu::{Gpu, GpuOptions, Tuned, Tuning};

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

/// Counts warnings that name a tuning cache.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
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
        let warnings = Warnings::default();
        let to = warnings.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_ansi(false)
            .with_writer(move || to.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let gpu = open(Tuning::Cached, dir.path());
            assert_eq!(gpu.tuned("matmul class"), None, "{what}");
        });
        let log = String::from_utf8(warnings.0.lock().unwrap().clone()).unwrap();
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
