//! Run directories.

use lavender_wgpu::train::config::Config;
use lavender_wgpu::train::{checkpoint, rundir::RunDir};

#[test]
fn a_run_is_made_once_and_opened_again_with_its_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.run.dir = Some(dir.path().join("r"));
    config.train.batch = 3;
    let run = RunDir::create(&config).unwrap();
    let error = RunDir::create(&config).unwrap_err().to_string();
    assert!(
        error.contains("not empty") && error.contains("--resume"),
        "{error}"
    );

    let (opened, read, none) = RunDir::open(run.root()).unwrap();
    assert_eq!((opened, read, none), (run.clone(), config, None));
    std::fs::create_dir_all(run.checkpoints().join(".writing-x")).unwrap();
    checkpoint::write(&run.checkpoints(), 5, &1, |_| Ok(())).unwrap();
    let (_, _, last) = RunDir::open(run.root()).unwrap();
    assert_eq!(last.unwrap().step, 5);
    assert!(!run.checkpoints().join(".writing-x").exists());
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = RunDir::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("config.toml"), "{error}");
    let error = RunDir::open(dir.path().join("nowhere"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("nowhere"), "{error}");
}
