//! Runtime options: what containerd's configuration or a client says about how to run the OCI runtime.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message, UnknownValueRef};
use containerd_shim_protos::shim::oci;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

const FILE: &str = "options.json";

/// Options of one container. The names of the stored form are those that the runc v2 shim stores, those of TOML the
/// ones that containerd's CRI configuration has for `io.containerd.runc.v2`; other keys are somebody else's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// The OCI runtime's binary; empty: the node's default.
    #[serde(alias = "BinaryName", skip_serializing_if = "String::is_empty")]
    pub binary_name: String,
    /// Where the runtime keeps its state; empty: `/run/containerd/runc`.
    #[serde(alias = "Root", skip_serializing_if = "String::is_empty")]
    pub root: String,
    /// Whether cgroups are made by systemd.
    #[serde(alias = "SystemdCgroup")]
    pub systemd_cgroup: bool,
    /// chroot instead of pivot_root.
    #[serde(alias = "NoPivotRoot")]
    pub no_pivot_root: bool,
    /// No session keyring of its own.
    #[serde(alias = "NoNewKeyring")]
    pub no_new_keyring: bool,
    /// cgroup of the shim itself.
    #[serde(alias = "ShimCgroup", skip_serializing_if = "String::is_empty")]
    pub shim_cgroup: String,
    /// Owner of the standard streams' pipes.
    #[serde(alias = "IoUid")]
    pub io_uid: u32,
    /// Group of the standard streams' pipes.
    #[serde(alias = "IoGid")]
    pub io_gid: u32,
    /// The criu to use, a path that ends in `/criu`; empty: the one in PATH.
    #[serde(alias = "CriuPath", skip_serializing_if = "String::is_empty")]
    pub criu_path: String,
    /// Where criu keeps an image.
    #[serde(alias = "CriuImagePath", skip_serializing_if = "String::is_empty")]
    pub criu_image_path: String,
    /// Where criu works.
    #[serde(alias = "CriuWorkPath", skip_serializing_if = "String::is_empty")]
    pub criu_work_path: String,
}

/// The fields of `runtimeoptions.v1.Options`, which CRI sends for every runtime type that it does not know.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Generic {
    /// Type of the options, as the administrator named it.
    pub type_url: String,
    /// A TOML file with the options.
    pub config_path: String,
    /// The options as TOML; counts before the file.
    pub config_body: Vec<u8>,
}

impl Generic {
    /// Decodes the message; containerd-shim-protos does not have it.
    pub fn decode(bytes: &[u8]) -> containerd_shim_protos::protobuf::Result<Self> {
        let mut generic = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            // Field number in the upper bits; 2 in the lower three: length-delimited.
            match tag {
                0x0a => generic.type_url = input.read_string()?,
                0x12 => generic.config_path = input.read_string()?,
                0x1a => generic.config_body = input.read_bytes()?,
                other => containerd_shim_protos::protobuf::rt::read_unknown_or_skip_group(
                    other,
                    &mut input,
                    &mut Default::default(),
                )?,
            }
        }
        Ok(generic)
    }

    /// The TOML text, from the body or the file.
    pub fn toml(&self) -> Result<String> {
        if self.config_body.is_empty() && !self.config_path.is_empty() {
            return fs::read_to_string(&self.config_path).map_err(Error::io(format!(
                "read runtime options {}",
                self.config_path
            )));
        }
        String::from_utf8(self.config_body.clone()).map_err(|_| {
            Error::InvalidArgument(
                "runtime options: config_body is not UTF-8, so it cannot be TOML".to_owned(),
            )
        })
    }
}

impl Options {
    /// Understands what containerd sends with `create`, `start` or `-info`, by its type.
    pub fn decode(any: &Any) -> Result<Self> {
        let malformed = |error: &dyn std::fmt::Display| {
            Error::InvalidArgument(format!(
                "runtime options of type {:?}: {error}",
                any.type_url
            ))
        };
        // The type is a bare message name from containerd, an URL with the name at its end from others.
        match any.type_url.rsplit('/').next().unwrap_or_default() {
            "" if any.value.is_empty() => Ok(Self::default()),
            "containerd.runc.v1.Options" => {
                let options = oci::Options::parse_from_bytes(&any.value)
                    .map_err(|error| malformed(&error))?;
                Ok(Self {
                    criu_path: criu_path(&options)?,
                    binary_name: options.binary_name,
                    root: options.root,
                    systemd_cgroup: options.systemd_cgroup,
                    no_pivot_root: options.no_pivot_root,
                    no_new_keyring: options.no_new_keyring,
                    shim_cgroup: options.shim_cgroup,
                    io_uid: options.io_uid,
                    io_gid: options.io_gid,
                    criu_image_path: options.criu_image_path,
                    criu_work_path: options.criu_work_path,
                })
            }
            "containerd.linux.runc.CreateOptions" => {
                Self::decode_old(&any.value).map_err(|error| malformed(&error))
            }
            "runtimeoptions.v1.Options" => {
                let generic = Generic::decode(&any.value).map_err(|error| malformed(&error))?;
                let text = generic.toml()?;
                toml::from_str(&text).map_err(|error: toml::de::Error| {
                    let at = error.span().map_or(0, |span| span.start);
                    let before = text.get(..at).unwrap_or_default();
                    let line = text
                        .lines()
                        .nth(before.matches('\n').count())
                        .unwrap_or_default();
                    malformed(&format_args!("{} in {line:?}", error.message()))
                })
            }
            _ => Err(Error::InvalidArgument(format!(
                "runtime options of type {:?} are not understood: expected containerd.runc.v1.Options, containerd.linux.runc.CreateOptions or runtimeoptions.v1.Options",
                any.type_url
            ))),
        }
    }

    /// The message that clients of containerd 1 fill in for a runtime whose name does not begin with `io.containerd.runc`, when a user
    /// asks for users of the container's own, no pivot_root or a cgroup for the shim. containerd-shim-protos does not have it.
    fn decode_old(bytes: &[u8]) -> containerd_shim_protos::protobuf::Result<Self> {
        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            // Field number in the upper bits; in the lower three 0: a number, 2: length-delimited.
            match tag {
                0x08 => options.no_pivot_root = input.read_bool()?,
                0x40 => options.no_new_keyring = input.read_bool()?,
                0x4a => options.shim_cgroup = input.read_string()?,
                0x50 => options.io_uid = input.read_uint32()?,
                0x58 => options.io_gid = input.read_uint32()?,
                0x62 => options.criu_work_path = input.read_string()?,
                0x6a => options.criu_image_path = input.read_string()?,
                other => containerd_shim_protos::protobuf::rt::read_unknown_or_skip_group(
                    other,
                    &mut input,
                    &mut Default::default(),
                )?,
            }
        }
        Ok(options)
    }

    /// Reads what [`Self::store`] left in a bundle; the default when there is nothing.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| Error::Malformed {
                path,
                detail: error.to_string(),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io(format!("read {}", path.display()))(error)),
        }
    }

    /// Keeps the options in the bundle, for `delete` after a crash.
    pub fn store(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(FILE);
        let text = serde_json::to_vec(self).map_err(|error| Error::Malformed {
            path: path.clone(),
            detail: error.to_string(),
        })?;
        fs::write(&path, text).map_err(Error::io(format!("write {}", path.display())))
    }

    /// Where the runtime keeps the state of `namespace`'s containers.
    pub fn runtime_root(&self, namespace: &str) -> PathBuf {
        let root = if self.root.is_empty() {
            "/run/containerd/runc"
        } else {
            &self.root
        };
        Path::new(root).join(namespace)
    }
}

/// Field 8, which containerd 2 has no more.
fn criu_path(options: &oci::Options) -> Result<String> {
    match options.special_fields.unknown_fields().get(8) {
        Some(UnknownValueRef::LengthDelimited(bytes)) => String::from_utf8(bytes.to_vec())
            .map_err(|error| Error::InvalidArgument(format!("CriuPath of the options: {error}"))),
        _ => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn every_kind_by_its_type() {
        let runc = oci::Options {
            binary_name: "crun".to_owned(),
            io_uid: 7,
            ..Default::default()
        };
        let value = runc.write_to_bytes().expect("encode");
        for name in [
            "containerd.runc.v1.Options",
            "types.containerd.io/containerd.runc.v1.Options",
        ] {
            let options = Options::decode(&any(name, value.clone())).expect(name);
            assert_eq!((options.binary_name.as_str(), options.io_uid), ("crun", 7));
        }
        let with_criu = any("containerd.runc.v1.Options", b"\x42\x07/x/criu".to_vec());
        let options = Options::decode(&with_criu).expect("of containerd 1");
        assert_eq!(options.criu_path, "/x/criu");
        // type_url (1), config_body (3) and a field that is not known yet (4).
        let value = b"\x0a\x01t\x1a\x28SystemdCgroup = true\nIoGid = 9\nother = 1\x20\x05".to_vec();
        let options = Options::decode(&any("runtimeoptions.v1.Options", value)).expect("TOML");
        assert_eq!((options.systemd_cgroup, options.io_gid), (true, 9));
        // Every field that counts, and one that does not (cgroups_mode, 7).
        let value =
            b"\x08\x01\x3a\x04soft\x40\x01\x4a\x02/s\x50\xe0\xa7\x12\x58\x05\x62\x02/w\x6a\x02/i";
        let old = any("containerd.linux.runc.CreateOptions", value.to_vec());
        let expected = Options {
            no_pivot_root: true,
            no_new_keyring: true,
            shim_cgroup: "/s".to_owned(),
            io_uid: 300_000,
            io_gid: 5,
            criu_work_path: "/w".to_owned(),
            criu_image_path: "/i".to_owned(),
            ..Default::default()
        };
        assert_eq!(Options::decode(&old).expect("of containerd 1"), expected);
        assert_eq!(
            Options::decode(&Any::new()).expect("nothing"),
            Options::default()
        );
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (name, value, part) in [
            ("example.Options", "", "example.Options"),
            (
                "runtimeoptions.v1.Options",
                "\x1a\x09IoUid = -",
                "IoUid = -",
            ),
            ("runtimeoptions.v1.Options", "\x12\x05/none", "/none"),
            ("runtimeoptions.v1.Options", "\x1a\x7f", "runtimeoptions"),
            ("containerd.runc.v1.Options", "\x0a", "containerd.runc"),
            (
                "containerd.linux.runc.CreateOptions",
                "\x4a\x7f",
                "linux.runc",
            ),
        ] {
            let error = Options::decode(&any(name, value.as_bytes().to_vec()))
                .expect_err(name)
                .to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let bundle = tempfile::tempdir().expect("a directory");
        assert_eq!(
            Options::load(bundle.path()).expect("none"),
            Options::default()
        );
        let options = Options {
            root: "/r".to_owned(),
            no_pivot_root: true,
            io_uid: 3,
            ..Default::default()
        };
        options.store(bundle.path()).expect("store");
        assert_eq!(Options::load(bundle.path()).expect("stored"), options);
        assert_eq!(options.runtime_root("ns"), Path::new("/r/ns"));
        assert_eq!(
            Options::default().runtime_root("ns"),
            Path::new("/run/containerd/runc/ns")
        );
        // As the runc v2 shim leaves it.
        fs::write(
            bundle.path().join(FILE),
            "{\"binary_name\":\"crun\",\"systemd_cgroup\":true}",
        )
        .expect("write");
        let options = Options::load(bundle.path()).expect("the other shim's");
        assert_eq!(
            (options.binary_name.as_str(), options.systemd_cgroup),
            ("crun", true)
        );
    }
}
