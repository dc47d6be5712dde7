//! The forms in which cgroup files state numbers.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

/// A file that may be missing: its controller is off, or the kernel is older.
pub(super) fn text(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        // ENODEV: the container is gone, EOPNOTSUPP: e.g. pressure that is switched off.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::Unsupported
            ) || error.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A number; `max` is the greatest one. What is neither (e.g. a negative limit) is 0.
pub(super) fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

/// A file that holds one number; 0 when it is missing.
pub(super) fn value(directory: &Path, name: &str) -> io::Result<u64> {
    Ok(text(&directory.join(name))?.map_or(0, |text| number(&text)))
}

/// A file with a key and a number in every line; None when it is missing.
pub(super) fn table(directory: &Path, name: &str) -> io::Result<Option<Table>> {
    let Some(text) = text(&directory.join(name))? else {
        return Ok(None);
    };
    let pairs = text
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace));
    Ok(Some(Table(
        pairs
            .map(|(key, value)| (key.to_owned(), number(value)))
            .collect(),
    )))
}

/// Keys and numbers.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<String, u64>);

impl Table {
    /// The number of `key`; 0 when it is missing.
    pub(super) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

/// Sizes of huge pages that have files `hugetlb.SIZE.SUFFIX` in a cgroup.
pub(super) fn huge_page_sizes(directory: &Path, suffix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut sizes: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name
                .strip_prefix("hugetlb.")?
                .strip_suffix(suffix)?
                .strip_suffix('.')?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    Ok(sizes)
}

/// Lines `device key=number key=number`, as the rdma controller has them.
pub(super) fn rdma(directory: &Path, name: &str) -> io::Result<Vec<(String, u32, u32)>> {
    let text = text(&directory.join(name))?.unwrap_or_default();
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let device = words.next()?.to_owned();
        let (mut handles, mut objects) = (0, 0);
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = u32::try_from(number(value)).unwrap_or(u32::MAX);
            match key {
                "hca_handle" => handles = value,
                "hca_object" => objects = value,
                _ => {}
            }
        }
        Some((device, handles, objects))
    };
    Ok(text.lines().filter_map(entry).collect())
}
