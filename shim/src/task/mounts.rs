//! Mounts of a container's root file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use kbp_kernel::idmap::IdRange;

use super::error::{Error, Result};

mod mapped;

use mapped::id_ranges;
pub use mapped::unmount_layers;

/// Mounts that are undone when this is dropped.
#[derive(Debug)]
pub struct Mounted {
    target: Option<PathBuf>,
}

impl Mounted {
    /// Leaves them mounted.
    pub fn keep(mut self) {
        self.target = None;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(target) = self.target.take()
            && let Err(error) = unmount_below(&target)
        {
            tracing::warn!("{error}");
        }
    }
}

/// Mounts what containerd's snapshotter asks for, one over the other, at `target` (made if need be).
pub async fn mount_all(mounts: Vec<Mount>, target: PathBuf) -> Result<Mounted> {
    blocking("mount the root file system", move || {
        fs::create_dir_all(&target).map_err(Error::io(format!("make {}", target.display())))?;
        let mounted = Mounted {
            target: Some(target.clone()),
        };
        for entry in &mounts {
            mount_one(entry, &target)?;
        }
        Ok(mounted)
    })
    .await
}

/// Unmounts everything at and below `target`.
pub async fn unmount_all(target: PathBuf) -> Result<()> {
    blocking("unmount the root file system", move || {
        unmount_below(&target)
    })
    .await
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::io(what)(io::Error::from(error)))?
}

/// Options of mount(8) that are flags of mount(2): those to set, and for each word whether it sets or clears.
const FLAGS: &[(&str, bool, MsFlags)] = &[
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("remount", true, MsFlags::MS_REMOUNT),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
];

const PROPAGATION: &[(&str, MsFlags)] = &[
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    flags: MsFlags,
    propagation: Vec<MsFlags>,
    data: Vec<String>,
    /// Owners that the files are to show, of users and of groups; empty: their own.
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

fn parse(options: &[String]) -> Result<Parsed> {
    let mut parsed = Parsed {
        flags: MsFlags::empty(),
        propagation: Vec::new(),
        data: Vec::new(),
        users: Vec::new(),
        groups: Vec::new(),
    };
    for option in options {
        if option == "defaults" {
            continue;
        }
        if let Some((_, set, flag)) = FLAGS.iter().find(|(name, ..)| name == option) {
            parsed.flags.set(*flag, *set);
        } else if let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| name == option) {
            parsed.propagation.push(*flag);
        } else if let Some(map) = option.strip_prefix("uidmap=") {
            parsed.users = id_ranges(map)?;
        } else if let Some(map) = option.strip_prefix("gidmap=") {
            parsed.groups = id_ranges(map)?;
        } else if option == "loop" {
            return Err(Error::Unimplemented(
                "mount option \"loop\" of the root file system asks for a loop device, which this shim does not make; \
                 let containerd mount it (a snapshotter that prepares its own mounts)"
                    .to_owned(),
            ));
        } else {
            parsed.data.push(option.clone());
        }
    }
    Ok(parsed)
}

fn mount_one(entry: &Mount, target: &Path) -> Result<()> {
    let target = if entry.target.is_empty() {
        target.to_owned()
    } else {
        inside(target, &entry.target)?
    };
    let mut parsed = parse(&entry.options)?;
    if parsed.users.is_empty() != parsed.groups.is_empty() {
        return Err(Error::InvalidArgument(format!(
            "mount options {:?} map users or groups alone; give uidmap and gidmap",
            entry.options
        )));
    }
    let is_mapped = !parsed.users.is_empty();
    let what = || {
        format!(
            "mount {} ({}) at {}",
            entry.source,
            entry.type_,
            target.display()
        )
    };
    let fail = |errno: Errno| Error::Io {
        what: what(),
        source: errno.into(),
    };

    // They go with this; the overlay keeps what it needs of them.
    let _layers = if is_mapped && entry.type_ == "overlay" {
        Some(mapped::layers(&mut parsed, &target)?)
    } else {
        None
    };
    let data = parsed.data.join(",");
    let is_bind = parsed.flags.contains(MsFlags::MS_BIND);
    if is_mapped && is_bind {
        mapped::bind(&parsed, Path::new(&entry.source), &target)?;
    } else if is_mapped && entry.type_ != "overlay" {
        return Err(Error::Unimplemented(format!(
            "{} with mapped owners: only overlay and bind mounts can have them; \
             let containerd change the owners of the files (slow_chown = true in its overlayfs snapshotter)",
            what()
        )));
    } else if !parsed.flags.contains(MsFlags::MS_REMOUNT) || !data.is_empty() {
        if data.len() >= PAGE {
            mount_long(entry, &target, parsed.flags, &parsed.data)
                .map_err(|error| Error::io(what())(error))?;
        } else {
            let data = (!data.is_empty()).then_some(data.as_str());
            mount(
                Some(entry.source.as_str()),
                &target,
                Some(entry.type_.as_str()),
                parsed.flags,
                data,
            )
            .map_err(fail)?;
        }
    }
    // A bind takes over the flags of its source; its own ones need a remount.
    let own = MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_REMOUNT;
    if is_bind && !(parsed.flags - own).is_empty() {
        mount(
            None::<&str>,
            &target,
            None::<&str>,
            parsed.flags | MsFlags::MS_REMOUNT,
            None::<&str>,
        )
        .map_err(fail)?;
    }
    for propagation in parsed.propagation {
        mount(
            None::<&str>,
            &target,
            None::<&str>,
            propagation,
            None::<&str>,
        )
        .map_err(fail)?;
    }
    Ok(())
}

/// A mount inside the root file system, for snapshotters that ask for several; never outside of it.
fn inside(root: &Path, target: &str) -> Result<PathBuf> {
    let relative = Path::new(target.trim_start_matches('/'));
    if relative
        .components()
        .any(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        return Err(Error::InvalidArgument(format!(
            "mount target {target:?} leaves the root file system"
        )));
    }
    let path = root.join(relative);
    match path.canonicalize() {
        Ok(real) if root.canonicalize().is_ok_and(|root| real.starts_with(root)) => Ok(path),
        Ok(_) => Err(Error::InvalidArgument(format!(
            "mount target {target:?} leaves the root file system"
        ))),
        Err(error) => Err(Error::io(format!("find mount target {}", path.display()))(
            error,
        )),
    }
}

/// mount(2) copies one page of options.
const PAGE: usize = 4096;

/// Mounts an overlay with so many layers that their paths do not fit a page: from a thread that works in the directory
/// which they have in common, with relative paths.
fn mount_long(entry: &Mount, target: &Path, flags: MsFlags, data: &[String]) -> io::Result<()> {
    let (common, data) = shorten(data).ok_or(Errno::E2BIG)?;
    let (source, kind, target) = (entry.source.clone(), entry.type_.clone(), target.to_owned());
    let work = move || -> io::Result<()> {
        // The working directory is the thread's own from here on.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&common)?;
        Ok(mount(
            Some(source.as_str()),
            &target,
            Some(kind.as_str()),
            flags,
            Some(data.as_str()),
        )?)
    };
    let thread = std::thread::Builder::new()
        .name("mount".to_owned())
        .spawn(work)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the mounting thread died")))
}

/// The directory that all lower layers have in common, and the options with paths relative to it where that is shorter.
fn shorten(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&str> = lower.split(':').collect();
    if layers
        .iter()
        .any(|layer| !layer.starts_with('/') || layer.contains('\\'))
    {
        return None;
    }
    let mut common = Path::new(layers.first()?).parent()?;
    while !layers
        .iter()
        .all(|layer| Path::new(layer).starts_with(common))
    {
        common = common.parent()?;
    }
    let relative = |path: &str| {
        Path::new(path)
            .strip_prefix(common)
            .ok()
            .filter(|rest| !rest.as_os_str().is_empty())
            .map_or_else(
                || path.to_owned(),
                |rest| rest.to_string_lossy().into_owned(),
            )
    };
    let options: Vec<String> = data
        .iter()
        .map(|option| match option.split_once('=') {
            Some(("lowerdir", _)) => {
                let layers: Vec<String> = layers.iter().map(|layer| relative(layer)).collect();
                format!("lowerdir={}", layers.join(":"))
            }
            Some((key @ ("upperdir" | "workdir"), path)) => format!("{key}={}", relative(path)),
            _ => option.clone(),
        })
        .collect();
    let options = options.join(",");
    (options.len() < PAGE).then(|| (common.to_owned(), options))
}

/// Unmounts everything at and below `target`, newest first; goes on where one fails and reports the first failure.
pub fn unmount_below(target: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(Error::io("read /proc/self/mountinfo"))?;
    // What is mounted is listed by real paths.
    let Ok(real) = target.canonicalize() else {
        return Ok(());
    };
    let mut failed = None;
    for point in mount_points(&table)
        .into_iter()
        .rev()
        .filter(|point| point.starts_with(&real))
    {
        let unmounted = umount2(&point, MntFlags::UMOUNT_NOFOLLOW).or_else(|errno| match errno {
            // Somebody looks into it. It goes when they are gone; meanwhile nobody new finds it.
            Errno::EBUSY => umount2(&point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
            // Gone already.
            Errno::EINVAL | Errno::ENOENT => Ok(()),
            other => Err(other),
        });
        if let Err(errno) = unmounted {
            failed.get_or_insert(Error::Io {
                what: format!("unmount {}", point.display()),
                source: errno.into(),
            });
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Mount points in the order of mounting, from the text of mountinfo (proc_pid_mountinfo(5)).
fn mount_points(table: &str) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .collect()
}

/// Undoes the octal escapes of blank, tab, newline and backslash.
fn unescape(field: &str) -> String {
    let mut text = field.to_owned();
    for (escape, plain) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        text = text.replace(escape, plain);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_become_flags_propagation_and_data() {
        let parsed = parse(&strings(&[
            "rbind",
            "ro",
            "nosuid",
            "rw",
            "rprivate",
            "lowerdir=/a:/b",
            "index=off",
        ]))
        .expect("known options");
        assert_eq!(
            parsed.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID
        );
        assert_eq!(parsed.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert_eq!(parsed.data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_by_name() {
        let error = parse(&strings(&["loop"])).expect_err("not supported");
        assert!(
            matches!(&error, Error::Unimplemented(text) if text.contains("loop")),
            "{error}"
        );
        for option in [
            "uidmap=0:1000",
            "gidmap=0:1000:x",
            "uidmap=",
            "uidmap=1:2:3:4",
        ] {
            let error = parse(&strings(&[option])).expect_err("no mapping");
            assert!(
                matches!(&error, Error::InvalidArgument(text) if text.contains("0:100000:65536")),
                "{error}"
            );
        }
    }

    #[test]
    fn owners_are_mapped_by_ranges() {
        let parsed = parse(&strings(&[
            "uidmap=0:1000:1,1:100000:65535",
            "gidmap=0:5:6",
        ]));
        let parsed = parsed.expect("mappings");
        let range = |inside, outside, count| IdRange {
            inside,
            outside,
            count,
        };
        assert_eq!(parsed.users, [range(0, 1000, 1), range(1, 100_000, 65_535)]);
        assert_eq!(parsed.groups, [range(0, 5, 6)]);
        assert!(parsed.data.is_empty());
    }

    #[test]
    fn long_options_are_shortened_to_their_common_directory() {
        let layers: Vec<String> = (0..100)
            .map(|layer| format!("/var/lib/snapshots/{layer}/fs"))
            .collect();
        let data = vec![
            "upperdir=/var/lib/snapshots/new/fs".to_owned(),
            "workdir=/elsewhere/work".to_owned(),
            format!("lowerdir={}", layers.join(":")),
        ];
        let (common, options) = shorten(&data).expect("they fit");
        assert_eq!(common, Path::new("/var/lib/snapshots"));
        assert!(
            options.starts_with("upperdir=new/fs,workdir=/elsewhere/work,lowerdir=0/fs:1/fs:"),
            "{options}"
        );
    }

    #[test]
    fn mount_points_are_unescaped() {
        let table =
            "36 35 98:0 / /run/a\\040b rw - ext4 /dev/x rw\n37 36 0:1 / /run/c rw - tmpfs t rw\n";
        assert_eq!(
            mount_points(table),
            [PathBuf::from("/run/a b"), PathBuf::from("/run/c")]
        );
    }

    #[test]
    fn targets_stay_inside() {
        let root = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink("/", root.path().join("out")).expect("a link");
        assert!(inside(root.path(), "../x").is_err());
        assert!(inside(root.path(), "/out").is_err());
        fs::create_dir(root.path().join("in")).expect("a directory");
        assert_eq!(
            inside(root.path(), "/in").expect("inside"),
            root.path().join("in")
        );
    }
}
