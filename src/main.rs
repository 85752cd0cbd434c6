//! The `lavender-wgpu` program: see `lavender-wgpu --help`.

fn main() -> std::process::ExitCode {
    lavender_wgpu::cli::main()
}
