//! Starting the program the way cargo does: through its runner, where one is set.

use std::process::{Command, Output};

/// The built program, ready for arguments.
pub fn program() -> Command {
    let binary = env!("CARGO_BIN_EXE_lavender-wgpu");
    // Cargo passes its environment on to tests; only one triple's runner is ever set.
    let runner = std::env::vars()
        .find(|(key, _)| key.starts_with("CARGO_TARGET_") && key.ends_with("_RUNNER"))
        .map(|(_, value)| value)
        .filter(|value| !value.trim().is_empty());
    let Some(runner) = runner else {
        return Command::new(binary);
    };
    let mut words = runner.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or(binary));
    command.args(words).arg(binary);
    command
}

/// Runs the program and gives what it printed.
pub fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts what every refused input has in common: exit code 1, one `error:` line, no panic; gives that line.
pub fn refused(output: &Output) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "expected one error line in:\n{text}");
    assert!(!text.contains("panicked"), "{text}");
    errors[0].to_owned()
}

/// [`refused`], with every one of `parts` in the message.
pub fn refused_with(args: &[&str], parts: &[&str]) {
    let error = refused(&run(args));
    for part in parts {
        assert!(error.contains(part), "`{error}` lacks `{part}`");
    }
}
