//! The crate's one error type: what a user's input, a file or the GPU can cause.

use std::io;
use std::path::{Path, PathBuf};

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong through a user's input, a file or a device.
///
/// A wrong shape inside our own model code is a bug and panics instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a path.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path that was touched.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file was read but its content is wrong: field, found and expected.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Which field, what was found, what was expected, what to do.
        message: String,
    },
    /// A tensor in a checkpoint is missing or has another shape or dtype.
    #[error("{}: tensor `{name}`: {message}", path.display())]
    Tensor {
        /// The checkpoint file or directory.
        path: PathBuf,
        /// The tensor's name in the checkpoint.
        name: String,
        /// Found and expected.
        message: String,
    },
    /// A configuration key or value is wrong.
    #[error("{0}")]
    Config(String),
    /// An argument, caption, prompt or image is unusable.
    #[error("{0}")]
    Input(String),
    /// No GPU adapter fits the request.
    #[error("{0}")]
    NoAdapter(String),
    /// The adapter (or the given memory limit) has no room for an allocation.
    #[error(
        "out of GPU memory: {requested} bytes more were needed with {in_use} bytes in use{}; \
         use a smaller batch, image or model, or `--precision f16`",
        limit.map(|l| format!(" (limit {l} bytes)")).unwrap_or_default()
    )]
    OutOfMemory {
        /// Bytes of the allocation that failed.
        requested: u64,
        /// Bytes held at that moment.
        in_use: u64,
        /// The limit in force, if one was given.
        limit: Option<u64>,
    },
    /// A tensor exceeds what the adapter can bind in one dispatch.
    #[error(
        "{op}: a tensor of {bytes} bytes exceeds this adapter's binding limit of {limit} bytes"
    )]
    BindingTooLarge {
        /// The operation.
        op: String,
        /// Bytes that would have been bound.
        bytes: u64,
        /// The adapter's `max_storage_buffer_binding_size`.
        limit: u64,
    },
    /// The device went away (driver reset, unplugged, watchdog).
    #[error(
        "the GPU device was lost: {0}; everything saved so far is intact, start again with `--resume`"
    )]
    DeviceLost(String),
    /// Any other error that the GPU reported.
    #[error("GPU error: {0}")]
    Gpu(String),
    /// A loss or gradient is NaN or infinite.
    #[error("step {step}: {what} is not finite; {advice}")]
    NotFinite {
        /// The training step.
        step: u64,
        /// The first quantity or op found to be NaN or infinite.
        what: String,
        /// What to do, and what is kept.
        advice: String,
    },
    /// The user pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        Error::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// An [`Error::File`] for `path`.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::File {
            path: path.as_ref().to_path_buf(),
            message: message.into(),
        }
    }

    /// An [`Error::Tensor`] for tensor `name` of the checkpoint at `path`.
    pub fn tensor(
        path: impl AsRef<Path>,
        name: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Error::Tensor {
            path: path.as_ref().to_path_buf(),
            name: name.into(),
            message: message.into(),
        }
    }

    /// The [`Error::NoAdapter`] of a machine without any: says what to install.
    pub fn no_adapter() -> Self {
        Error::NoAdapter(
            "no GPU adapter found: install a Vulkan driver (Linux: `apt install mesa-vulkan-drivers` \
             or the vendor's driver; Windows: the vendor's driver; macOS has Metal), or run `make train`, \
             which sets up a software one"
                .into(),
        )
    }
}
