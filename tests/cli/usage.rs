//! Help, version and wrong usage.

use crate::support::{run, stderr, stdout};

#[test]
fn every_command_has_help_with_examples() {
    let top = run(&["-h"]);
    assert_eq!(top.status.code(), Some(0));
    let text = stdout(&top);
    let commands: Vec<&str> = text
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.contains(&"devices"), "{text}");
    for command in commands {
        let help = run(&[command, "-h"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        let text = stdout(&help);
        assert!(
            text.contains("Examples:\n") && text.contains(&format!("lavender-wgpu {command}")),
            "{text}"
        );
        assert!(
            text.contains("--adapter") && text.contains("--quiet"),
            "{text}"
        );
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["nonsense"][..],
        &["devices", "--nonsense"],
        &["--precision", "f8", "devices"],
        &[],
    ] {
        let output = run(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(stdout(&output).is_empty());
    }
    assert!(stderr(&run(&["devicse"])).contains("devices"));
}

#[test]
fn version_is_the_package_version() {
    assert_eq!(
        stdout(&run(&["--version"])).trim(),
        concat!("lavender-wgpu ", env!("CARGO_PKG_VERSION"))
    );
}
