//! Reading results back without stalling the stream.

use std::sync::mpsc;

use super::{Buffer, Gpu};
use crate::error::{Error, Result};

/// Bytes on their way to the host; [`ReadBack::wait`] blocks only for the submissions up to its own.
pub struct ReadBack {
    gpu: Gpu,
    staging: wgpu::Buffer,
    mapped: mpsc::Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
    submission: Option<wgpu::SubmissionIndex>,
    bytes: u64,
}

impl Gpu {
    /// Starts copying `bytes` at `offset` of `buffer` to the host, after all work recorded so far.
    ///
    /// Panics while a plan is made: its replays would not be read.
    pub fn read_later(&self, buffer: &Buffer, offset: u64, bytes: u64) -> ReadBack {
        assert!(!self.planning(), "a read-back within a plan");
        let padded = bytes.next_multiple_of(4).max(4);
        let staging = self.inner().device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("readback"),
            size: padded,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        if !self.inner().faults.any() {
            self.copy_raw(buffer.raw(), offset, &staging, 0, padded);
        }
        let submission = self.flush();
        let (sender, mapped) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone when the caller dropped the read-back: nobody wants the result.
            let _ = sender.send(result);
        });
        ReadBack {
            gpu: self.clone(),
            staging,
            mapped,
            submission,
            bytes,
        }
    }
}

impl ReadBack {
    /// Waits for the copy and returns its bytes.
    ///
    /// # Errors
    /// Any error the GPU has reported by then, as [`Gpu::check`].
    pub fn wait(self) -> Result<Vec<u8>> {
        self.gpu.poll_wait(self.submission.clone());
        self.gpu.check()?;
        match self.mapped.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Error::Gpu(format!("read-back failed: {error}"))),
            Err(_) => return Err(Error::DeviceLost("read-back never arrived".into())),
        }
        let view = self
            .staging
            .get_mapped_range(..)
            .map_err(|e| Error::Gpu(format!("read-back failed: {e}")))?;
        Ok(view[..self.bytes as usize].to_vec())
    }
}
