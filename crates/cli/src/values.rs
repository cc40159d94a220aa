//! What flags take: each function reads one value from text, or says how to write it.

use std::net::SocketAddr;
use std::time::Duration;

use brigade_base::{ByteSize, MAX_NODE_NAME_CHARS, is_node_name};
use brigade_gguf::MAX_SCALE;
use brigade_node::{AdapterFile, DirectFetch, PrefixCache};
use brigade_plan::Optimize;

/// A month: beyond it a ticket is no ticket but an open door. The endpoint makes none that lives longer.
const TICKET_TTL_MAX: Duration = Duration::from_secs(31 * 24 * 3600);

/// How long a ticket lives.
pub fn ticket_ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(text).map_err(|_| "write a time such as 30m, 1h or 2days".to_owned())?;
    if ttl < Duration::from_secs(1) || ttl > TICKET_TTL_MAX {
        return Err("a ticket lives from 1s to 31days".to_owned());
    }
    Ok(ttl)
}

/// A day: who waits longer for one request has forgotten it.
const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long a request may take.
pub fn request_timeout(text: &str) -> Result<Duration, String> {
    let timeout = humantime::parse_duration(text).map_err(|_| "write a time such as 90s or 10m".to_owned())?;
    if timeout < Duration::from_millis(100) || timeout > REQUEST_TIMEOUT_MAX {
        return Err("a request takes from 100ms to 1day".to_owned());
    }
    Ok(timeout)
}

/// A day: who waits longer for a machine to come back, or for the last answers to end, has forgotten it.
const WAIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long to wait for something; 0s does not.
pub fn wait(text: &str) -> Result<Duration, String> {
    let wait = humantime::parse_duration(text).map_err(|_| "write a time such as 30s or 5m, or 0s".to_owned())?;
    if wait > WAIT_MAX {
        return Err("this waits at most 1day".to_owned());
    }
    Ok(wait)
}

/// A sampling temperature.
pub fn temperature(text: &str) -> Result<f32, String> {
    // NaN and infinities lie in no range.
    let number = text.parse().ok().filter(|number| (0.0..=2.0).contains(number));
    number.ok_or_else(|| "write a number from 0 to 2".to_owned())
}

/// A share of time.
pub fn throttle(text: &str) -> Result<f32, String> {
    // Below a hundredth a pass would outlast every timeout.
    let share = text.parse().ok().filter(|share| (0.01..=1.0).contains(share));
    share.ok_or_else(|| "write a share from 0.01 to 1, for example 0.5".to_owned())
}

/// An adapter, as `FILE` or `FILE:SCALE`.
pub fn adapter(text: &str) -> Result<AdapterFile, String> {
    let scaled = text.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.parse().ok()?)));
    let (path, scale) = scaled.unwrap_or((text, 1.0));
    let is_sound = |scale: f32| scale != 0.0 && scale.abs() <= MAX_SCALE;
    if path.is_empty() || !is_sound(scale) {
        return Err(format!("write FILE or FILE:SCALE with a scale from -{MAX_SCALE} to {MAX_SCALE} that is not 0"));
    }
    Ok(AdapterFile { path: path.into(), scale })
}

/// What a placement is to be best at.
pub fn optimize(text: &str) -> Result<Optimize, String> {
    match text {
        "latency" => Ok(Optimize::Latency),
        "throughput" => Ok(Optimize::Throughput),
        "balanced" => Ok(Optimize::Balanced),
        "memory" => Ok(Optimize::Memory),
        _ => Err("write latency, throughput, balanced or memory".to_owned()),
    }
}

/// What the prefix cache may use.
pub fn prefix_cache(text: &str) -> Result<PrefixCache, String> {
    match text {
        "full" => Ok(PrefixCache::Full),
        "exact" => Ok(PrefixCache::Exact),
        "off" => Ok(PrefixCache::Off),
        _ => Err("write full, exact or off".to_owned()),
    }
}

/// Whether weights may come from where the model was downloaded from.
pub fn direct_fetch(text: &str) -> Result<DirectFetch, String> {
    match text {
        "auto" => Ok(DirectFetch::Auto),
        "off" => Ok(DirectFetch::Off),
        "on" => Ok(DirectFetch::On),
        _ => Err("write auto, off or on".to_owned()),
    }
}

/// Whether a worker may have weights from there. What stands for all verbs may be `on`, which is for another one:
/// whether it was meant for this verb is not known here.
pub fn may_fetch(text: &str) -> Result<DirectFetch, String> {
    direct_fetch(text).map_err(|_| "write auto or off".to_owned())
}

/// A name for people.
pub fn node_name(text: &str) -> Result<String, String> {
    if !is_node_name(text) {
        return Err(format!("a name has 1 to {MAX_NODE_NAME_CHARS} printable characters"));
    }
    Ok(text.to_owned())
}

/// `IP:PORT`, or `:PORT` for all addresses.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let whole = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    whole.parse().map_err(|_| "write IP:PORT, for example 192.168.1.5:7411, [::]:0 or :7411".to_owned())
}

/// A machine that is not there: its name, its memory, and what it is, if that was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedNode {
    /// Its name.
    pub name: String,
    /// What it gives.
    pub memory: ByteSize,
    /// What the catalogue calls it.
    pub device: Option<String>,
}

/// A machine, as `tower=16GiB` or `tower=16GiB@rtx-3090`.
pub fn named_node(text: &str) -> Result<NamedNode, String> {
    let advice = "write NAME=SIZE or NAME=SIZE@DEVICE, for example tower=16GiB@rtx-3090";
    let (name, rest) = text.split_once('=').ok_or(advice)?;
    let (size, device) = rest.split_once('@').map_or((rest, None), |(size, device)| (size, Some(device)));
    if device.is_some_and(str::is_empty) {
        return Err(advice.to_owned());
    }
    let memory = size.parse().map_err(|error: brigade_base::ByteSizeError| error.to_string())?;
    Ok(NamedNode { name: node_name(name)?, memory, device: device.map(str::to_owned) })
}

/// A price.
pub fn price(text: &str) -> Result<f64, String> {
    // Nobody pays more; and NaN and infinities lie in no range.
    let price = text.parse().ok().filter(|price| (0.0..=1e6).contains(price));
    price.ok_or_else(|| "write a price such as 0.30".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_times_are_read() {
        assert_eq!(listen_address(":7411").unwrap().to_string(), "[::]:7411");
        assert!(listen_address("tower").is_err());
        assert_eq!(ticket_ttl("90m"), Ok(Duration::from_secs(5400)));
        assert!(ticket_ttl("0s").is_err() && ticket_ttl("9y").is_err());
        assert_eq!(request_timeout("90s"), Ok(Duration::from_secs(90)));
        assert!(request_timeout("0s").is_err() && request_timeout("2days").is_err() && request_timeout("").is_err());
        assert_eq!((wait("0s"), wait("5m")), (Ok(Duration::ZERO), Ok(Duration::from_secs(300))));
        assert!(wait("2days").is_err() && wait("-1s").is_err() && wait("soon").is_err());
        assert_eq!((temperature("0"), temperature("2")), (Ok(0.0), Ok(2.0)));
        for wrong in ["nan", "inf", "-1", "2.1", "warm", ""] {
            assert!(temperature(wrong).is_err(), "{wrong}");
        }
        assert_eq!((throttle("0.5"), throttle("1")), (Ok(0.5), Ok(1.0)));
        for wrong in ["0", "-0.5", "1.1", "nan", "half"] {
            assert!(throttle(wrong).is_err(), "{wrong}");
        }
        let lora = |path: &str, scale| Ok(AdapterFile { path: path.into(), scale });
        assert_eq!(adapter("a.gguf"), lora("a.gguf", 1.0));
        assert_eq!(adapter("dir/a.gguf:-0.5"), lora("dir/a.gguf", -0.5));
        assert_eq!(adapter("C:a.gguf"), lora("C:a.gguf", 1.0));
        for wrong in ["", ":1", "a:0", "a:nan", "a:1001"] {
            assert!(adapter(wrong).is_err(), "{wrong}");
        }
        assert_eq!((may_fetch("auto"), may_fetch("off")), (Ok(DirectFetch::Auto), Ok(DirectFetch::Off)));
        assert!(may_fetch("yes").is_err_and(|error| !error.contains("on")));
        assert_eq!(direct_fetch("on"), Ok(DirectFetch::On));
        assert!(price("0.3") == Ok(0.3) && price("-1").is_err() && price("nan").is_err());
        let node = |device: Option<&str>| NamedNode {
            name: "a".to_owned(),
            memory: ByteSize::gib(2),
            device: device.map(str::to_owned),
        };
        assert_eq!((named_node("a=2GiB"), named_node("a=2GiB@m1")), (Ok(node(None)), Ok(node(Some("m1")))));
        for wrong in ["a", "a=", "=2GiB", "a=2GiB@", "a=much"] {
            assert!(named_node(wrong).is_err(), "{wrong}");
        }
    }
}
