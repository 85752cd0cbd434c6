//! TensorBoard's event files, read back by the format's own rules.

use crc::{CRC_32_ISCSI, Crc};
use lavender_wgpu::train::events::EventWriter;

fn masked(data: &[u8]) -> u32 {
    Crc::<u32>::new(&CRC_32_ISCSI)
        .checksum(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// The records of the only event file in a directory, checksums checked.
fn records(dir: &std::path::Path) -> Vec<Vec<u8>> {
    let files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1);
    assert!(
        files[0]
            .file_name()
            .unwrap()
            .to_string_lossy()
            .contains("tfevents")
    );
    let bytes = std::fs::read(&files[0]).unwrap();
    let u32_at = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(u32_at(at + 8), masked(&bytes[at..at + 8]));
        let data = &bytes[at + 12..at + 12 + length];
        assert_eq!(u32_at(at + 12 + length), masked(data));
        found.push(data.to_vec());
        at += 16 + length;
    }
    found
}

#[test]
fn scalars_are_tf_events() {
    // The published check value of CRC-32C.
    assert_eq!(
        Crc::<u32>::new(&CRC_32_ISCSI).checksum(b"123456789"),
        0xe306_9283
    );
    let dir = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::create(dir.path(), 0).unwrap();
    writer.scalars(300, &[("loss", 0.5), ("lr", 1e-4)]).unwrap();
    let found = records(dir.path());
    assert_eq!(found.len(), 2);
    assert!(found[0].ends_with(b"\x1a\x0dbrain.Event:2"));
    // wall_time: field 1, double; step 300 as a varint; summary: field 5 with two values.
    let event = &found[1];
    assert_eq!(event[0], 0x09);
    assert_eq!(&event[9..12], [0x10, 0xac, 0x02]);
    let mut expected = vec![0x2a, 24, 0x0a, 11, 0x0a, 4];
    expected.extend(b"loss");
    expected.push(0x15);
    expected.extend(0.5f32.to_le_bytes());
    expected.extend([0x0a, 9, 0x0a, 2]);
    expected.extend(b"lr");
    expected.push(0x15);
    expected.extend(1e-4f32.to_le_bytes());
    assert_eq!(&event[12..], expected);
}

#[test]
fn a_resumed_run_restarts_the_session_at_its_step() {
    let dir = tempfile::tempdir().unwrap();
    EventWriter::create(dir.path(), 7).unwrap();
    let found = records(dir.path());
    assert_eq!(&found[1][9..], [0x10, 7, 0x3a, 2, 0x08, 0x01]);
}
