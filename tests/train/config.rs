//! Configuration files and `--set`.

use lavender_wgpu::align::options::{Aggregate, LambdaSchedule, Layers};
use lavender_wgpu::train::config::{Config, KEYS, Precision};

fn parse(text: &str, sets: &[&str]) -> Result<Config, String> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    Config::parse(text, "run.toml", &sets).map_err(|e| e.to_string())
}

#[test]
fn defaults_are_the_methods() {
    let c = parse("", &[]).unwrap();
    assert_eq!(c, Config::default());
    assert_eq!((c.lora.r, c.lora.alpha, c.lora.dropout), (8, 32.0, 0.05));
    assert_eq!(c.lora.target_modules, ["q_proj", "v_proj"]);
    assert_eq!(
        (c.optimizer.lr, c.optimizer.gamma, c.optimizer.weight_decay),
        (1e-4, 0.85, 0.0)
    );
    assert_eq!(
        (c.train.batch, c.loss.lambda, c.aligner.hidden),
        (4, 10.0, 32)
    );
    assert_eq!(c.total_steps(10), 9);
}

#[test]
fn every_key_is_known_and_survives_writing() {
    let text = r#"
        [model]
        path = "m"
        [data]
        path = "d.json"
        images = "i"
        targets = "t"
        diffusion = "sd"
        without_targets = "skip"
        max_tokens = 512
        workers = 2
        shuffle = false
        [words]
        source = "labels"
        case = "keep"
        [attention]
        aggregate = "max-max"
        parallel = "map"
        layers = [3, 5]
        [aligner]
        kind = "light"
        hidden = 7
        norm = "none"
        activation = "leaky-relu"
        [loss]
        lambda = 2.5
        schedule = "exponential"
        decay = 3
        aligner_warmup_steps = 4
        [lora]
        r = 4
        alpha = 16
        dropout = 0.1
        target_modules = ["q_proj"]
        exclude_modules = ["vision_model.q_proj"]
        [optimizer]
        lr = 3e-4
        betas = [0.8, 0.9]
        eps = 1e-6
        weight_decay = 0.01
        gamma = 1
        aligner_lr = 1e-3
        schedule = "cosine"
        warmup_steps = 3
        grad_clip = 0
        [train]
        mode = "lora"
        freeze = ["vision", "layers.0-3"]
        batch = 2
        accumulate = 3
        checkpoint_activations = true
        bucket = 64
        keep = 2
        early_stop = 3
        epochs = 5
        seed = 9
        precision = "f16"
        checkpoint_every = 10
        [eval]
        path = "e.json"
        images = "ei"
        targets = "et"
        every = 20
        [init]
        lora = "l"
        aligner = "a.safetensors"
        parallel = "p.safetensors"
        [run]
        dir = "r"
        pictures = 3
        pictures_every = 50
    "#;
    let config = parse(text, &[]).unwrap();
    assert_eq!(config.attention.layers, Layers::List(vec![3, 5]));
    assert_eq!(config.attention.aggregate, Aggregate::MaxMax);
    assert_eq!(config.train.precision, Precision::F16);
    let written = config.to_toml().unwrap();
    assert_eq!(parse(&written, &[]).unwrap(), config);

    // The list of keys is the struct's: all but those that exclude another stand in this text.
    let table: toml::Table = toml::from_str(&written).unwrap();
    let mut keys: Vec<String> = table
        .iter()
        .flat_map(|(t, v)| {
            v.as_table()
                .unwrap()
                .keys()
                .map(move |k| format!("{t}.{k}"))
        })
        .chain(["train.steps".to_owned(), "data.mixture".to_owned()])
        .collect();
    let mut known: Vec<String> = KEYS.iter().map(|k| k.to_string()).collect();
    keys.sort();
    known.sort();
    assert_eq!(keys, known);
}

#[test]
fn a_mixture_is_a_list_of_data_sets() {
    use lavender_wgpu::train::config::{MixturePart, WithoutTargets};
    let part = |path: &str, weight| MixturePart {
        path: path.into(),
        images: None,
        targets: None,
        weight,
    };
    let text = "[data]\nworkers = 0\n[[data.mixture]]\npath = \"a.json\"\n\
                [[data.mixture]]\npath = \"b\"\nimages = \"i\"\ntargets = \"t\"\nweight = 0.5\n";
    let config = parse(text, &[]).unwrap();
    let mut second = part("b", 0.5);
    second.images = Some("i".into());
    second.targets = Some("t".into());
    assert_eq!(config.data.mixture, [part("a.json", 1.0), second]);
    assert_eq!(config.data.without_targets, WithoutTargets::Language);
    assert_eq!(config.data.stores(), [None, Some("t".into())]);
    assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), config);
    let set = parse("", &["data.mixture=[{path = \"a.json\", weight = 2}]"]).unwrap();
    assert_eq!(set.data.mixture, [part("a.json", 2.0)]);

    for (text, wanted) in [
        (
            "[[data.mixture]]\npath = \"a\"\nwieght = 2",
            "unknown field `wieght`",
        ),
        (
            "[[data.mixture]]\npath = \"a\"\nweight = 0",
            "a weight above 0",
        ),
        ("[[data.mixture]]\nweight = 1", "missing field `path`"),
        (
            "[data]\npath = \"x\"\n[[data.mixture]]\npath = \"a\"",
            "beside `data.mixture`",
        ),
    ] {
        let error = parse(text, &[]).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn set_changes_one_key_and_later_ones_win() {
    let text = "[train]\nepochs = 2\n[run]\ndir = \"a\"";
    let c = parse(
        text,
        &[
            "run.dir=b/c",
            "train.steps=70",
            "loss.lambda=0",
            "attention.layers=last:2",
            "data.targets=7",
        ],
    )
    .unwrap();
    assert_eq!(c.run.dir.as_deref(), Some(std::path::Path::new("b/c")));
    assert_eq!((c.train.steps, c.train.epochs), (Some(70), None));
    assert_eq!(
        (c.loss.lambda, c.attention.layers.clone()),
        (0.0, Layers::Last(2))
    );
    assert_eq!(c.data.targets.as_deref(), Some(std::path::Path::new("7")));
    let c = parse(
        text,
        &[
            "train.steps=70",
            "train.steps=8",
            "lora.target_modules=[\"k_proj\"]",
        ],
    )
    .unwrap();
    assert_eq!(c.train.steps, Some(8));
    assert_eq!(c.lora.target_modules, ["k_proj"]);
}

#[test]
fn bad_files_are_refused_with_line_field_found_and_expected() {
    let cases: [(&str, &[&str]); 16] = [
        (
            "[train]\nbatch = 4\nstep = 3",
            &["line 3", "unknown key `train.step`", "`train.steps`"],
        ),
        (
            "[lora]\n\nlamda = 3",
            &["line 3", "`lora.lamda`", "`loss.lambda`"],
        ),
        (
            "[optimiser]\nlr = 1",
            &["line 1", "`optimiser", "`optimizer.lr`"],
        ),
        ("lambda = 3", &["line 1", "`loss.lambda`"]),
        ("train = 3", &["line 1", "`[train]`"]),
        (
            "[train]\nbatch = \"four\"",
            &["line 2", "`train.batch`", "four"],
        ),
        ("[train]\nbatch = -4", &["line 2", "`train.batch`", "-4"]),
        (
            "[train]\nbatch = 0",
            &["line 2", "`train.batch`", "found 0", "at least 1"],
        ),
        (
            "[train]\nbatch = 4611686018427387904",
            &["line 2", "`train.batch`", "at most 65536"],
        ),
        (
            "[train]\nepochs = 9223372036854775807",
            &["line 2", "`train.epochs`", "at most"],
        ),
        (
            "[data]\nmax_tokens = 0",
            &["line 2", "`data.max_tokens`", "at least 1"],
        ),
        (
            "[train]\nsteps = 3\nepochs = 3",
            &["line 3", "`train.epochs`", "`train.steps`"],
        ),
        (
            "[attention]\naggregate = \"mean\"",
            &["line 2", "`attention.aggregate`", "mean-mean"],
        ),
        (
            "[attention]\nlayers = \"last\"",
            &["line 2", "`attention.layers`", "last:N"],
        ),
        (
            "[optimizer]\nlr = nan",
            &["line 2", "`optimizer.lr`", "NaN", "above 0"],
        ),
        ("[train\n", &["line 1"]),
    ];
    for (text, wanted) in cases {
        let error = parse(text, &[]).expect_err(text);
        for part in ["run.toml"].iter().chain(wanted) {
            assert!(
                error.contains(part),
                "{text}\n gave `{error}`\n without `{part}`"
            );
        }
    }
}

#[test]
fn bad_sets_are_refused_by_the_argument() {
    let cases: [(&str, &[&str]); 6] = [
        ("train.steps", &["KEY=VALUE"]),
        (
            "train.stepz=3",
            &["unknown key `train.stepz`", "`train.steps`"],
        ),
        ("train=3", &["unknown key `train`"]),
        ("train.batch=many", &["many"]),
        ("lora.dropout=1.5", &["`lora.dropout`", "1.5", "below 1"]),
        ("aligner.kind=none", &["`aligner.kind`", "mean-mean"]),
    ];
    for (set, wanted) in cases {
        let error = parse("", &[set]).expect_err(set);
        for part in [&format!("--set {set}")[..]].iter().chain(wanted) {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
    }
}

#[test]
fn schedules_follow_their_formulas() {
    let mut c = Config::default();
    assert_eq!((c.lambda(0, 10), c.lambda(9, 10)), (10.0, 10.0));
    c.loss.schedule = LambdaSchedule::Exponential;
    c.loss.decay = 2.0;
    assert!((c.lambda(5, 10) - 10.0 * (-1.0f64).exp()).abs() < 1e-12);
    assert!((c.learning_rate(9, 2, 10) - 1e-4 * 0.85 * 0.85).abs() < 1e-18);
    assert_eq!((c.steps_per_epoch(8), c.steps_per_epoch(9)), (2, 3));
}

#[test]
fn layers_are_chosen_among_those_there_are() {
    let available = [3, 8, 13];
    assert_eq!(Layers::All.choose(&available).unwrap(), available);
    assert_eq!(Layers::Last(2).choose(&available).unwrap(), [8, 13]);
    assert_eq!(Layers::List(vec![8]).choose(&available).unwrap(), [8]);
    for (layers, part) in [
        (Layers::Last(4), "3 such"),
        (Layers::List(vec![4]), "layer 4"),
    ] {
        assert!(layers.choose(&available).unwrap_err().contains(part));
    }
}
