//! LoRA factors beside frozen linear layers, read and written in PEFT's format.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::loader::{Init, Loader};
use super::parameters::{Kind, Parameters};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::files::write_bytes;
use crate::ops::dropout::dropout;
use crate::tensor::{Checkpoint, HostTensor, save_safetensors};

/// Low-rank adaptation of linear layers (Hu et al., 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The update is scaled by alpha / r.
    pub alpha: f32,
    /// Dropout on the update's input.
    pub dropout: f32,
    /// Module names; a module is adapted when its path is one of these or ends with `.name`.
    pub target_modules: Vec<String>,
}

impl LoraConfig {
    /// Whether PEFT would adapt the module at `path`.
    pub fn matches(&self, path: &str) -> bool {
        self.target_modules.iter().any(|name| {
            path == name
                || path
                    .strip_suffix(name.as_str())
                    .is_some_and(|p| p.ends_with('.'))
        })
    }
}

thread_local! {
    /// Seed of this step's dropout masks; `None` while not training.
    static DROPOUT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Sets the seed of dropout masks for the coming forward and backward; `None` turns dropout off.
pub fn set_dropout_seed(seed: Option<u64>) {
    DROPOUT.set(seed);
}

/// The two factors beside one linear layer.
pub(super) struct Lora {
    a: Var,
    b: Var,
    scale: f32,
    dropout: f32,
    site: u64,
}

impl Lora {
    /// Factors for the linear layer at `loader`'s prefix when the options ask for them.
    pub fn load(loader: &Loader, inputs: usize, outputs: usize) -> Option<Lora> {
        let config = loader.options().lora.as_ref()?;
        let path = loader.path("");
        if !config.matches(&path) {
            return None;
        }
        // Kaiming uniform with a = √5, as PEFT: ±1/√in.
        let bound = 1.0 / (inputs as f32).sqrt();
        Some(Lora {
            a: loader.lora_factor("lora_A.weight", &[config.r, inputs], Init::Uniform(bound)),
            b: loader.lora_factor("lora_B.weight", &[outputs, config.r], Init::Zeros),
            scale: config.alpha / config.r as f32,
            dropout: config.dropout,
            site: fnv1a(&path),
        })
    }

    /// scale · B A dropout(x), to be added to the layer's output.
    pub fn forward(&self, x: &Var) -> Var {
        let x = match DROPOUT.get() {
            Some(seed) if self.dropout > 0.0 => dropped(x, self.dropout, seed ^ self.site),
            _ => x.clone(),
        };
        x.linear(&self.a, None)
            .linear(&self.b, None)
            .scale(self.scale)
    }
}

/// Dropout whose mask depends on the seed alone, so that recomputation sees the same one.
fn dropped(x: &Var, p: f32, seed: u64) -> Var {
    Var::from_op(
        "dropout",
        dropout(x.value(), p, seed),
        &[x],
        move |dy, _| vec![Some(dropout(dy, p, seed))],
    )
}

/// FNV-1a, to give every layer a dropout stream of its own.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

const PREFIX: &str = "base_model.model.";

/// Writes `adapter_model.safetensors` and `adapter_config.json` into `dir`, as PEFT does.
///
/// # Errors
/// A GPU error while reading back, or files that cannot be written.
pub fn save_lora(
    dir: &Path,
    parameters: &Parameters,
    config: &LoraConfig,
    base_model: &str,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut tensors = Vec::new();
    for p in parameters.all().iter().filter(|p| p.kind == Kind::Lora) {
        let tensor = HostTensor::f32(p.var.shape(), &p.var.value().to_f32()?);
        tensors.push((format!("{PREFIX}{}", p.name), tensor));
    }
    let metadata = [("format".to_string(), "pt".to_string())];
    let weights = dir.join("adapter_model.safetensors");
    save_safetensors(&weights, &tensors, Some(metadata.into()))?;
    let json = serde_json::json!({
        "peft_type": "LORA",
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "r": config.r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": null,
        "target_modules": config.target_modules,
        "task_type": null,
        "use_dora": false,
        "use_rslora": false,
    });
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::file(dir, e.to_string()))?;
    write_bytes(dir.join("adapter_config.json"), text.as_bytes())
}

/// The configuration in `dir`'s `adapter_config.json`.
///
/// # Errors
/// A missing or unreadable file, or an adapter type other than plain LoRA.
pub fn lora_config(dir: &Path) -> Result<LoraConfig> {
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
    let bad = |field: &str, wanted: &str| {
        Error::file(
            &path,
            format!("field `{field}`: {} found, {wanted} expected", json[field]),
        )
    };
    if json["peft_type"] != "LORA" {
        return Err(bad("peft_type", "\"LORA\""));
    }
    for field in ["use_dora", "use_rslora", "fan_in_fan_out"] {
        if json[field] == true {
            return Err(bad(field, "false"));
        }
    }
    let modules = json["target_modules"].as_array();
    let modules = modules.ok_or_else(|| bad("target_modules", "a list of names"))?;
    Ok(LoraConfig {
        r: json["r"].as_u64().ok_or_else(|| bad("r", "an integer"))? as usize,
        alpha: json["lora_alpha"]
            .as_f64()
            .ok_or_else(|| bad("lora_alpha", "a number"))? as f32,
        dropout: json["lora_dropout"].as_f64().unwrap_or(0.0) as f32,
        target_modules: modules
            .iter()
            .filter_map(|m| m.as_str().map(String::from))
            .collect(),
    })
}

/// Fills the model's LoRA factors from `dir`, accepting the key dialects of older and newer
/// `transformers` (`rename` maps a module path to today's).
///
/// # Errors
/// The first factor that is missing, superfluous or of another shape, by name.
pub fn load_lora(
    dir: &Path,
    parameters: &Parameters,
    rename: impl Fn(&str) -> String,
) -> Result<()> {
    let file = Checkpoint::open(dir, "adapter_model")?.rename(|name| {
        let bare = name.strip_prefix(PREFIX).unwrap_or(name);
        rename(&bare.replace(".default.weight", ".weight"))
    });
    let wanted: BTreeMap<String, Var> = parameters
        .all()
        .into_iter()
        .filter(|p| p.kind == Kind::Lora)
        .map(|p| (p.name, p.var))
        .collect();
    if let Some(name) = file.names().find(|name| !wanted.contains_key(*name)) {
        let message = "this model has no such module; the adapter was made for another base";
        return Err(Error::tensor(dir, name, message));
    }
    for (name, var) in &wanted {
        let values = file.values_of(name, var.shape())?;
        var.value().write_f32(&values);
    }
    Ok(())
}
