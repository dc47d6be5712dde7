//! The files below `config/` that a person merges into containerd's own: containerd has to take them as they are.

use std::path::Path;

use kbp_tests::lab::LIMIT;
use kbp_tests::{Containerd, Generation, Sandbox, Settings, command};

/// What Debian's package says of CRI: a merge must not lose it.
const PACKAGED: &str = r#"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
"#;

/// Path of a shipped file.
fn shipped(name: &str) -> String {
    format!("{}/../config/containerd/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The configuration that containerd makes of one file, with its defaults.
fn dump(containerd: &Containerd<'_>, file: &Path) -> String {
    let mut run = containerd.command("containerd");
    run.arg("--config").arg(file).args(["config", "dump"]);
    let output = command::run(run, LIMIT).expect("containerd config dump");
    output.success().expect("the dump").stdout
}

fn assert_handlers(dump: &str) {
    for handler in ["kbp", "runc"] {
        let end = format!(".containerd.runtimes.{handler}]");
        assert!(
            dump.lines().any(|line| line.trim().ends_with(&end)),
            "no handler {handler}:\n{dump}"
        );
    }
    assert!(dump.contains("io.containerd.kbp.v1"), "{dump}");
    assert!(dump.contains("kbp.io/*"), "{dump}");
}

/// The CRI plugin comes up with the handler, the default one, and what the package says.
fn version_2_is_merged(generation: Generation) {
    if generation.is_wanting() {
        return;
    }
    let path = shipped("version-2.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}"));
    // The file that it is merged into says so already.
    let tables = text.replacen("version = 2\n", "", 1);
    assert_ne!(tables, text, "{path} does not say its version");

    let sandbox = Sandbox::new().expect("sandbox");
    let settings = Settings {
        cri: true,
        config: format!("{PACKAGED}{tables}"),
        ..Settings::default()
    };
    let containerd = Containerd::start_with(&sandbox, generation, settings).expect("containerd");
    let plugins = containerd.ctr(["plugins", "list"]).expect("ctr");
    let plugins = plugins.success().expect("the plugins").stdout;
    let cri = plugins
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.get(1) == Some(&"cri"));
    let cri = cri.unwrap_or_else(|| panic!("no CRI plugin: {plugins}"));
    assert_eq!(cri.last(), Some(&"ok"), "{cri:?}\n{}", containerd.log());

    let dump = dump(&containerd, &sandbox.dir().join("containerd.toml"));
    assert_handlers(&dump);
    assert!(dump.contains("bin_dir = \"/usr/lib/cni\""), "{dump}");
}

#[test]
fn the_machines_containerd_takes_the_snippet_of_version_2() {
    version_2_is_merged(Generation::Machine);
}

#[test]
fn containerd_1_7_takes_the_snippet_of_version_2() {
    version_2_is_merged(Generation::V1_7);
}

#[test]
fn containerd_2_takes_the_snippet_of_version_3_as_an_import() {
    let sandbox = Sandbox::new().expect("sandbox");
    if Generation::V2.is_wanting() {
        return;
    }
    let containerd = Containerd::start(&sandbox, Generation::V2).expect("containerd");
    let file = sandbox.dir().join("main.toml");
    let text = format!(
        "version = 3\nimports = [{:?}]\n\n[plugins.\"io.containerd.cri.v1.runtime\".cni]\n  bin_dirs = [\"/usr/lib/cni\"]\n",
        shipped("version-3.toml")
    );
    std::fs::write(&file, text).expect("write");
    let dump = dump(&containerd, &file);
    assert_handlers(&dump);
    assert!(dump.contains("bin_dirs = ['/usr/lib/cni']"), "{dump}");
}
