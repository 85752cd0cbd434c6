//! TensorBoard events: scalars in the TFRecord framing of `tf.Event` messages.
//!
//! Written by hand because the crates that do it bring a TLS stack or a second image library. The format: each record
//! is its length (u64), the masked CRC-32C of these 8 bytes, the message, and the message's masked CRC-32C, all
//! little-endian (TensorFlow, `record_writer.cc`); the message is protobuf (`event.proto`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};

use crate::{Error, Result};

/// An open event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `dir` for a run that goes on at `step`.
    ///
    /// A resumed run's file makes TensorBoard forget what earlier files say about `step` and later ones.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        let now = seconds();
        // Nanoseconds keep two files of one second apart; TensorBoard reads files in the order of their names.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.lavender",
            now as u64,
            (now.fract() * 1e9) as u64
        );
        let path = dir.join(name);
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        let mut writer = Self { path, file };
        // Event.file_version = 3.
        writer.record(&message(now, 0, 3, b"brain.Event:2"))?;
        if step > 0 {
            // Event.session_log = 7 { status = 1: START = 1 }.
            writer.record(&message(now, step, 7, &[0x08, 0x01]))?;
        }
        Ok(writer)
    }

    /// Adds named values of one step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            // Summary.Value { tag = 1, simple_value = 2 }, repeated as Summary.value = 1.
            let mut one = Vec::new();
            bytes_field(&mut one, 1, tag.as_bytes());
            one.push(2 << 3 | 5);
            one.extend((*value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &one);
        }
        // Event.summary = 5.
        self.record(&message(seconds(), step, 5, &summary))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        self.file
            .write_all(&record)
            .map_err(|e| Error::io(&self.path, e))
    }
}

fn seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// `Event { wall_time = 1, step = 2, <field> }`.
fn message(wall_time: f64, step: u64, field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(wall_time.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    bytes_field(&mut out, field, content);
    out
}

fn bytes_field(out: &mut Vec<u8>, field: u8, content: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// TFRecord's mask keeps a CRC over data that holds CRCs from being weak.
fn masked_crc(data: &[u8]) -> u32 {
    let crc = Crc::<u32>::new(&CRC_32_ISCSI).checksum(data);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}
