//! Checkpoints are whole or not there.

use std::fs;
use std::path::Path;

use lavender_wgpu::Error;
use lavender_wgpu::train::checkpoint::{STATE, clean, last_whole, read, write};
use serde_json::json;

fn save(root: &Path, step: u64) -> std::path::PathBuf {
    write(root, step, &json!({"samples": step * 4}), |dir| {
        fs::create_dir(dir.join("lora")).unwrap();
        fs::write(
            dir.join("lora/adapter_model.safetensors"),
            vec![step as u8; 1000],
        )
        .unwrap();
        fs::write(dir.join("optimizer.safetensors"), b"moments").unwrap();
        Ok(())
    })
    .unwrap()
}

#[test]
fn the_last_whole_one_is_found_by_number() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(last_whole(&dir.path().join("none")).unwrap(), None);
    for step in [2, 10, 9] {
        save(dir.path(), step);
    }
    let last = last_whole(dir.path()).unwrap().unwrap();
    assert_eq!((last.step, &last.state["samples"]), (10, &json!(40)));
    assert_eq!(last.dir, dir.path().join("step-10"));
}

#[test]
fn one_that_was_cut_changed_or_never_finished_is_passed_over() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("no state", |d| fs::remove_file(d.join(STATE)).unwrap()),
        ("half a state", |d| {
            fs::write(d.join(STATE), "{\"step\": 2, \"fi").unwrap()
        }),
        ("a file missing", |d| {
            fs::remove_file(d.join("optimizer.safetensors")).unwrap()
        }),
        ("a file cut", |d| {
            fs::write(d.join("lora/adapter_model.safetensors"), vec![2; 999]).unwrap()
        }),
        ("a byte changed", |d| {
            fs::write(d.join("optimizer.safetensors"), b"momentz").unwrap()
        }),
    ];
    for (name, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 1);
        damage(&save(dir.path(), 2));
        assert!(read(&dir.path().join("step-2")).is_err(), "{name}");
        assert_eq!(last_whole(dir.path()).unwrap().unwrap().step, 1, "{name}");
        // Written again it is whole again.
        save(dir.path(), 2);
        assert_eq!(last_whole(dir.path()).unwrap().unwrap().step, 2, "{name}");
    }
}

#[test]
fn a_failed_write_leaves_nothing_and_a_killed_one_is_cleaned_up() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1);
    let error = write(dir.path(), 2, &json!({}), |d| {
        fs::write(d.join("half"), b"x").unwrap();
        Err(Error::io(
            d.join("half"),
            std::io::Error::other("no space left on device"),
        ))
    })
    .unwrap_err();
    assert!(error.to_string().contains("no space left"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    // What a kill in the middle of `fill` leaves.
    fs::create_dir(dir.path().join(".writing-abc")).unwrap();
    fs::write(dir.path().join(".writing-abc/half"), b"x").unwrap();
    assert_eq!(last_whole(dir.path()).unwrap().unwrap().step, 1);
    clean(dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_whole_one_never_changes() {
    let dir = tempfile::tempdir().unwrap();
    let place = save(dir.path(), 3);
    let before = fs::read(place.join(STATE)).unwrap();
    write(dir.path(), 3, &json!({"other": 1}), |_| {
        panic!("written again")
    })
    .unwrap();
    assert_eq!(fs::read(place.join(STATE)).unwrap(), before);
}
