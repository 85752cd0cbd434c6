//! The layout of the published target sets (`flickr1k-sd-attn`, `rlaif1k-sd-attn`): one 8-bit gray 32×32 JPEG per
//! word at `<root>/<image file name>/lpm_attention/<image stem>/attention_<word>.jpg`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::plan::files_with_prefix;
use super::{Provenance, SIDE, TargetOptions, Targets, same_options};
use crate::align::words::Word;
use crate::{Error, Result, files};

/// Beside the images' folders: the options that this program made them with. The published sets have no such file.
const RECORD: &str = "targets.json";

/// JPEG quality of maps that we write; the loss it costs is below 1/255 on smooth maps.
const QUALITY: u8 = 98;

/// A store of this layout, opened for reading.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    images: BTreeSet<String>,
    options: Option<TargetOptions>,
    provenance: Option<Provenance>,
}

/// What [`RECORD`] holds.
#[derive(serde::Serialize, serde::Deserialize)]
struct Record {
    #[serde(flatten)]
    options: TargetOptions,
    #[serde(flatten)]
    provenance: Provenance,
}

impl Store {
    /// Opens the store at `root`; `None` where no folder has maps of this layout.
    pub fn open(root: &Path) -> Result<Option<Self>> {
        let images = images(root)?;
        if images.is_empty() {
            return Ok(None);
        }
        let (options, provenance) = read_record(root)?
            .map(|r| (r.options, r.provenance))
            .unzip();
        Ok(Some(Self {
            root: root.to_path_buf(),
            images,
            options,
            provenance,
        }))
    }

    /// Number of images with maps.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// The recorded options, if this program wrote the store.
    pub fn options(&self) -> Option<&TargetOptions> {
        self.options.as_ref()
    }

    /// Whether there are targets of an image, by its file name.
    pub fn has(&self, image: &str) -> bool {
        self.images.contains(image)
    }

    /// Where the store was begun, if this program wrote it.
    pub fn provenance(&self) -> Option<&Provenance> {
        self.provenance.as_ref()
    }

    /// The words of an image by its file name. Errors: a folder that cannot be read.
    pub fn words(&self, image: &str) -> Result<Option<Vec<String>>> {
        if !self.images.contains(image) {
            return Ok(None);
        }
        let files = files_of(&self.root, image)?.into_iter();
        Ok(Some(files.map(|(word, _)| word).collect()))
    }

    /// The targets of an image by its file name. Errors: a map that is no 32×32 image.
    pub fn get(&self, image: &str) -> Result<Option<Targets>> {
        match self.images.contains(image) {
            true => read(&self.root, image).map(Some),
            false => Ok(None),
        }
    }
}

/// The images with maps under `root`.
pub(super) fn images(root: &Path) -> Result<BTreeSet<String>> {
    let mut images = BTreeSet::new();
    for item in std::fs::read_dir(root).map_err(|e| Error::io(root, e))? {
        let item = item.map_err(|e| Error::io(root, e))?;
        let name = item.file_name().to_string_lossy().into_owned();
        if maps_of(root, &name).is_dir() {
            images.insert(name);
        }
    }
    Ok(images)
}

/// The words of an image with the files of their maps, in order. Errors: a folder that cannot be read.
fn files_of(root: &Path, image: &str) -> Result<Vec<(String, PathBuf)>> {
    let dir = maps_of(root, image);
    let mut found = Vec::new();
    for item in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
        let path = item.map_err(|e| Error::io(&dir, e))?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let word = name
            .strip_prefix("attention_")
            .and_then(|n| n.strip_suffix(".jpg"));
        if let Some(word) = word.filter(|w| !w.is_empty()) {
            found.push((word.to_owned(), path));
        }
    }
    found.sort();
    Ok(found)
}

/// The maps of an image. Errors: one that is no 32×32 image.
pub(super) fn read(root: &Path, image: &str) -> Result<Targets> {
    let found = files_of(root, image)?;
    let mut words = Vec::with_capacity(found.len());
    let mut maps = Vec::with_capacity(found.len() * SIDE * SIDE);
    for (word, path) in found {
        let map = image::open(&path)
            .map_err(|e| Error::file(&path, format!("not a readable map: {e}")))?
            .to_luma8();
        if map.dimensions() != (SIDE as u32, SIDE as u32) {
            return Err(Error::file(
                &path,
                format!(
                    "map is {}×{} pixels, expected {SIDE}×{SIDE}",
                    map.width(),
                    map.height()
                ),
            ));
        }
        maps.extend(map.as_raw().iter().map(|&p| f32::from(p) / 255.0));
        words.push(Word {
            text: word,
            spans: Vec::new(),
        });
    }
    Ok(Targets {
        id: image.to_owned(),
        caption: String::new(),
        words,
        maps,
    })
}

/// The folder of an image's maps.
pub(super) fn maps_of(root: &Path, image: &str) -> PathBuf {
    let stem = Path::new(image).file_stem().unwrap_or_default();
    root.join(image).join("lpm_attention").join(stem)
}

fn read_record(root: &Path) -> Result<Option<Record>> {
    let path = root.join(RECORD);
    if !path.exists() {
        return Ok(None);
    }
    let record = serde_json::from_str(&files::read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not a record of targets: {e}")))?;
    Ok(Some(record))
}

/// Whether `root` was begun by this program in this layout.
pub(super) fn has_record(root: &Path) -> bool {
    root.join(RECORD).exists()
}

/// Notes the options of a store that is begun. Errors: it was begun with others, or holds maps of unknown options.
pub(super) fn record(root: &Path, options: &TargetOptions, provenance: &Provenance) -> Result<()> {
    if let Some(old) = read_record(root)? {
        return same_options(root, &old.options, options);
    }
    if !images(root)?.is_empty() {
        return Err(Error::file(
            root,
            format!(
                "holds lpm_attention maps but no `{RECORD}`, so that nobody knows which options made them; \
                 use another --out directory"
            ),
        ));
    }
    let record = Record {
        options: options.clone(),
        provenance: provenance.clone(),
    };
    let record =
        serde_json::to_vec_pretty(&record).map_err(|e| Error::file(root, e.to_string()))?;
    files::write_bytes(root.join(RECORD), &record)
}

/// Writes an image's maps: into a temporary folder, then renamed, so that an image has all of its maps or none.
/// Nothing where it has them.
pub(super) fn write(
    root: &Path,
    part: (usize, usize),
    image: &str,
    words: &[Word],
    maps: &[f32],
) -> Result<()> {
    let last = maps_of(root, image);
    if last.is_dir() {
        return Ok(());
    }
    let parent = root.join(image).join("lpm_attention");
    files::create_dir(&parent)?;
    let prefix = format!(".writing-{}of{}-", part.0, part.1);
    for left in files_with_prefix(&parent, &prefix)? {
        std::fs::remove_dir_all(&left).map_err(|e| Error::io(&left, e))?;
    }
    let temporary = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .tempdir_in(&parent)
        .map_err(|e| Error::io(&parent, e))?;
    for (word, map) in words.iter().zip(maps.chunks_exact(SIDE * SIDE)) {
        let pixels: Vec<u8> = map
            .iter()
            .map(|&x| (x.clamp(0.0, 1.0) * 255.0).round() as u8)
            .collect();
        let mut jpeg = Vec::new();
        let name = format!("attention_{}.jpg", word.text);
        let path = temporary.path().join(name);
        JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
            .write_image(&pixels, SIDE as u32, SIDE as u32, ExtendedColorType::L8)
            .map_err(|e| Error::file(&path, e.to_string()))?;
        files::write_bytes(&path, &jpeg)?;
    }
    // Private to the user as temporary folders are; a result should have the usual permissions.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(temporary.path(), open).map_err(|e| Error::io(&last, e))?;
    }
    let whole = temporary.keep();
    std::fs::rename(&whole, &last).map_err(|e| {
        let _ = std::fs::remove_dir_all(&whole);
        Error::io(&last, e)
    })?;
    files::sync_dir(&parent);
    Ok(())
}
