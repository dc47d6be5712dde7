//! Optional values of a JSON object, with errors that name the key, the value and what is allowed.

use serde_json::{Map, Value};

use super::error::{CniError, Result};

/// Whether an optional value of a result says nothing.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A value that is there; null is not.
fn present<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|value| !value.is_null())
}

/// A string under `key`; null is as good as none.
pub(crate) fn string<'a>(
    map: &'a Map<String, Value>,
    key: &str,
    allowed: &str,
) -> Result<Option<&'a str>> {
    present(map, key)
        .map(|value| {
            value
                .as_str()
                .ok_or_else(|| CniError::config(key, value, allowed))
        })
        .transpose()
}

/// A boolean under `key`; false when there is none.
pub(crate) fn boolean(map: &Map<String, Value>, key: &str) -> Result<bool> {
    present(map, key)
        .map(|value| {
            value
                .as_bool()
                .ok_or_else(|| CniError::config(key, value, "true, false"))
        })
        .transpose()
        .map(Option::unwrap_or_default)
}

/// An integer from `min` to `max` under `key`.
pub(crate) fn number(
    map: &Map<String, Value>,
    key: &str,
    min: u64,
    max: u64,
    allowed: &str,
) -> Result<Option<u64>> {
    present(map, key)
        .map(|value| {
            value
                .as_u64()
                .filter(|number| (min..=max).contains(number))
                .ok_or_else(|| CniError::config(key, value, allowed))
        })
        .transpose()
}

/// An object under `key`; `path` is what the error calls it.
pub(crate) fn object<'a>(
    map: &'a Map<String, Value>,
    key: &str,
    path: &str,
) -> Result<Option<&'a Map<String, Value>>> {
    present(map, key)
        .map(|value| {
            value
                .as_object()
                .ok_or_else(|| CniError::config(path, value, "a JSON object"))
        })
        .transpose()
}

/// A list of strings under `key`, as far as there is one; `path` is what the error calls it.
pub(crate) fn texts(map: &Map<String, Value>, key: &str, path: &str) -> Result<()> {
    let Some(value) = present(map, key) else {
        return Ok(());
    };
    match value.as_array() {
        Some(list) if list.iter().all(Value::is_string) => Ok(()),
        _ => Err(CniError::config(path, value, "a list of strings")),
    }
}
