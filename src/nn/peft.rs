//! LoRA adapters on disk, in the format of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::lora::{LoraConfig, MOST_RANK};
use super::parameters::{Kind, Parameters};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::files::{read_text, write_bytes};
use crate::tensor::{Checkpoint, HostTensor, save_safetensors};

const PREFIX: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";

/// Fields of `adapter_config.json` that ask for more than two factors beside a linear layer; each has to be absent,
/// null, false or empty.
const UNSUPPORTED: [&str; 10] = [
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "megatron_config",
];

/// Initialisations that change the base weights too: such an adapter fits no published base.
const OTHER_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

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
    // In their order: the first pattern that matches counts.
    let ranks = config.rank_pattern.iter();
    let ranks: Map<_, _> = ranks.map(|(k, r)| (k.clone(), (*r).into())).collect();
    let alphas = config.alpha_pattern.iter();
    let alphas: Map<_, _> = alphas.map(|(k, a)| (k.clone(), (*a).into())).collect();
    let json = serde_json::json!({
        "peft_type": "LORA",
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "exclude_modules": (!config.exclude_modules.is_empty()).then_some(&config.exclude_modules),
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "r": config.r,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "revision": null,
        "target_modules": config.target_modules,
        "task_type": null,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    });
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::file(dir, e.to_string()))?;
    write_bytes(dir.join(CONFIG), text.as_bytes())
}

/// The configuration in `dir`'s `adapter_config.json`. Where modules are chosen by a regular expression, by layer
/// numbers or with exceptions, `target_modules` are those that the adapter's file has factors for.
///
/// # Errors
/// A missing or unreadable file, an adapter type other than LoRA, a variant of it that is not supported, by name.
pub fn lora_config(dir: &Path) -> Result<LoraConfig> {
    let path = dir.join(CONFIG);
    let json: Value = serde_json::from_str(&read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
    let bad = |field: &str, wanted: &str| {
        let found = &json[field];
        Error::file(
            &path,
            format!("field `{field}`: {found} found, {wanted} expected"),
        )
    };
    if json["peft_type"] != "LORA" {
        return Err(bad("peft_type", "\"LORA\""));
    }
    if let Some(field) = UNSUPPORTED.iter().find(|field| is_set(&json[**field])) {
        return Err(bad(
            field,
            "nothing (this variant of LoRA is not supported)",
        ));
    }
    if json["bias"].as_str().is_some_and(|bias| bias != "none") {
        return Err(bad("bias", "\"none\""));
    }
    let init = json["init_lora_weights"].as_str().unwrap_or_default();
    if OTHER_BASE.iter().any(|name| init.starts_with(name)) {
        let wanted = "an initialisation that leaves the base weights alone (convert the adapter with \
                      `path_initial_model_for_weight_conversion` of PEFT's save_pretrained)";
        return Err(bad("init_lora_weights", wanted));
    }
    let rank = |value: &Value| {
        let rank = usize::try_from(value.as_u64()?).ok()?;
        (1..=MOST_RANK).contains(&rank).then_some(rank)
    };
    let number = |value: &Value| value.as_f64().map(|v| v as f32);
    let modules = json["target_modules"].as_array();
    let chosen = |field: &str| is_set(&json[field]);
    let by_file = json["target_modules"].is_string()
        || chosen("exclude_modules")
        || chosen("layers_to_transform");
    let target_modules = match (modules, by_file) {
        (_, true) => modules_of(dir)?,
        (Some(list), _) if list.iter().all(Value::is_string) => list
            .iter()
            .filter_map(|m| m.as_str().map(String::from))
            .collect(),
        _ => return Err(bad("target_modules", "a list of names")),
    };
    Ok(LoraConfig {
        r: rank(&json["r"]).ok_or_else(|| bad("r", "a whole number from 1 to 65536"))?,
        alpha: number(&json["lora_alpha"]).ok_or_else(|| bad("lora_alpha", "a number"))?,
        dropout: json["lora_dropout"].as_f64().unwrap_or(0.0) as f32,
        target_modules,
        exclude_modules: Vec::new(),
        use_rslora: json["use_rslora"] == true,
        use_dora: json["use_dora"] == true,
        rank_pattern: pattern(&json["rank_pattern"], rank).ok_or_else(|| {
            let wanted = "names of modules (no regular expressions) with a rank each";
            bad("rank_pattern", wanted)
        })?,
        alpha_pattern: pattern(&json["alpha_pattern"], number).ok_or_else(|| {
            let wanted = "names of modules (no regular expressions) with a number each";
            bad("alpha_pattern", wanted)
        })?,
    })
}

/// Whether a field of the configuration holds anything.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// `rank_pattern` or `alpha_pattern`: PEFT takes the keys as regular expressions for the end of a module's path. Plain
/// names are read, with an escaped dot or an anchor at either end; `None` for anything else.
fn pattern<T>(json: &Value, value: impl Fn(&Value) -> Option<T>) -> Option<Vec<(String, T)>> {
    let map = match json {
        Value::Null => return Some(Vec::new()),
        other => other.as_object()?,
    };
    let entry = |(key, v): (&String, &Value)| {
        let name = key.replace("\\.", ".");
        let name = name
            .trim_start_matches('^')
            .trim_end_matches('$')
            .to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        (name.chars().all(plain) && !name.is_empty()).then_some((name, value(v)?))
    };
    map.iter().map(entry).collect()
}

/// The paths of the modules that the adapter in `dir` has factors for.
fn modules_of(dir: &Path) -> Result<Vec<String>> {
    let file = lora_factors(dir, str::to_string)?;
    let modules: BTreeSet<String> = file.names().map(|name| module(name).to_owned()).collect();
    Ok(modules.into_iter().collect())
}

/// The module that a factor named `<module>.lora_A.weight` or `<module>.lora_B.weight`, or DoRA's
/// `<module>.lora_magnitude_vector`, stands beside.
fn module(name: &str) -> &str {
    [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"]
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .unwrap_or(name)
}

/// The factors of the adapter in `dir`, named `<module>.lora_A.weight` `[r, inputs]` and `<module>.lora_B.weight`
/// `[outputs, r]`, with DoRA also `<module>.lora_magnitude_vector` `[outputs]`, the module's path passed through `rename`
/// (to today's key dialect).
///
/// # Errors
/// A missing or damaged file; a tensor that is neither factor of a linear layer, by name.
pub fn lora_factors(dir: &Path, rename: impl Fn(&str) -> String) -> Result<Checkpoint> {
    let file = Checkpoint::open(dir, "adapter_model")?.rename(|name| {
        let bare = name.strip_prefix(PREFIX).unwrap_or(name);
        rename(&bare.replace(".default.weight", ".weight"))
    });
    if let Some(other) = file.names().find(|name| module(name) == *name) {
        let message =
            "neither `….lora_A.weight` nor `….lora_B.weight`: only LoRA of linear layers is read";
        return Err(Error::tensor(dir, other, message));
    }
    Ok(file)
}

/// Fills the model's LoRA factors from `dir`, accepting the key dialects of older and newer
/// `transformers` (`rename` maps a module path to today's).
///
/// # Errors
/// An adapter of another base: the first factor that is missing, superfluous or of another shape, by name.
pub fn load_lora(
    dir: &Path,
    parameters: &Parameters,
    rename: impl Fn(&str) -> String,
) -> Result<()> {
    let file = lora_factors(dir, rename)?;
    let wanted: BTreeMap<String, Var> = parameters
        .all()
        .into_iter()
        .filter(|p| p.kind == Kind::Lora)
        .map(|p| (p.name, p.var))
        .collect();
    let names: BTreeSet<&str> = file
        .names()
        .chain(wanted.keys().map(String::as_str))
        .collect();
    for name in names {
        let base = wanted.get(name).map(Var::shape);
        if file.shape(name) != base {
            return Err(another_base(dir, name, file.shape(name), base));
        }
    }
    for (name, var) in &wanted {
        let values = file.values_of(name, var.shape())?;
        var.value().write_f32(&values);
    }
    Ok(())
}

/// The first difference between an adapter and the base that it is put on.
pub fn another_base(
    dir: &Path,
    name: &str,
    adapter: Option<&[usize]>,
    base: Option<&[usize]>,
) -> Error {
    let side = |shape: Option<&[usize]>| shape.map_or("nothing".to_owned(), |s| format!("{s:?}"));
    let made_for = read_text(dir.join(CONFIG))
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .and_then(|json| json["base_model_name_or_path"].as_str().map(String::from))
        .map(|base| format!(" (`{base}`, says its {CONFIG})"))
        .unwrap_or_default();
    let message = format!(
        "{} in the adapter, {} in this base; the adapter was made for another base{made_for}",
        side(adapter),
        side(base)
    );
    Error::tensor(dir, name, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: Value) -> Result<LoraConfig> {
        let dir = tempfile::tempdir().expect("a directory");
        let mut whole = serde_json::json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        });
        for (key, value) in json.as_object().expect("an object") {
            whole[key] = value.clone();
        }
        write_bytes(dir.path().join(CONFIG), whole.to_string().as_bytes()).expect("written");
        lora_config(dir.path())
    }

    #[test]
    fn variants_that_are_not_supported_are_refused_by_name() {
        for (field, value) in [
            ("use_qalora", serde_json::json!(true)),
            ("fan_in_fan_out", serde_json::json!(true)),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("bias", serde_json::json!("all")),
            ("lora_bias", serde_json::json!(true)),
            ("trainable_token_indices", serde_json::json!([1])),
            ("init_lora_weights", serde_json::json!("pissa_niter_4")),
            ("rank_pattern", serde_json::json!({"layers.[01].q_proj": 2})),
            ("alpha_pattern", serde_json::json!({"q_proj": "two"})),
            ("peft_type", serde_json::json!("LOHA")),
            ("r", serde_json::json!(0)),
            ("r", serde_json::json!(1u64 << 40)),
            ("rank_pattern", serde_json::json!({"q_proj": 1u64 << 40})),
        ] {
            let error = config(serde_json::json!({ field: value })).expect_err(field);
            let wanted = format!("field `{field}`");
            assert!(error.to_string().contains(&wanted), "{error}");
        }
        let harmless = serde_json::json!({
            "modules_to_save": null, "use_dora": false, "megatron_core": "megatron.core", "loftq_config": {},
            "init_lora_weights": "gaussian", "use_rslora": true, "rank_pattern": {"^model\\.layers.1.q_proj": 2},
        });
        let config = config(harmless).expect("plain LoRA");
        assert!(config.use_rslora);
        assert_eq!(config.rank("model.layers.1.q_proj"), 2);
    }
}
