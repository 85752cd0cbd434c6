//! A compute kernel's identity: file, entry point, conditionals and override constants.

/// Names one variant of one kernel; equal values share one pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Stem of the file in `wgsl/`.
    pub file: &'static str,
    /// Entry point.
    pub entry: &'static str,
    /// `#ifdef` / `#if` / `#{NAME}` values, in the order given.
    pub defs: Vec<(&'static str, i32)>,
    /// Values of `override` constants.
    pub constants: Vec<(&'static str, f64)>,
}

impl Eq for Kernel {}

impl std::hash::Hash for Kernel {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.file.hash(state);
        self.entry.hash(state);
        self.defs.hash(state);
        for (name, value) in &self.constants {
            name.hash(state);
            value.to_bits().hash(state);
        }
    }
}

impl Kernel {
    /// The kernel of `wgsl/<file>.wgsl` with entry point `main`.
    pub fn new(file: &'static str) -> Kernel {
        Kernel {
            file,
            entry: "main",
            defs: Vec::new(),
            constants: Vec::new(),
        }
    }

    /// Another entry point of the same file.
    pub fn entry(mut self, entry: &'static str) -> Kernel {
        self.entry = entry;
        self
    }

    /// Defines `name` when `on`, for `#ifdef`.
    pub fn flag(mut self, name: &'static str, on: bool) -> Kernel {
        if on {
            self.defs.push((name, 1));
        }
        self
    }

    /// Defines `name` as an integer, for `#if NAME == 3` and `#{NAME}`.
    pub fn def(mut self, name: &'static str, value: i32) -> Kernel {
        self.defs.push((name, value));
        self
    }

    /// [`Kernel::def`] where there is a value.
    pub fn defs(mut self, name: &'static str, value: Option<i32>) -> Kernel {
        self.defs.extend(value.map(|value| (name, value)));
        self
    }

    /// Sets an `override` constant.
    pub fn constant(mut self, name: &'static str, value: f64) -> Kernel {
        self.constants.push((name, value));
        self
    }

    /// Label for profiles and dumps: `file.entry`.
    pub fn label(&self) -> String {
        if self.entry == "main" {
            self.file.to_string()
        } else {
            format!("{}.{}", self.file, self.entry)
        }
    }
}
