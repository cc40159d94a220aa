//! The HTTP endpoint of a node that serves or works: its keys, its port, and what it lets in.
//!
//! Everything is checked, and the port taken, before anything that lasts long begins.

use std::net::{SocketAddr, TcpListener};

use brigade_api::ApiOptions;

use crate::args::HttpArgs;
use crate::error::Failure;
use crate::files;

/// Largest file of keys: thousands of them.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;

/// A port that is taken, and whom it will let in.
#[derive(Debug)]
pub struct Front {
    /// The port.
    pub listener: TcpListener,
    /// Keys and names of hosts; nothing else is set.
    pub options: ApiOptions,
}

/// Takes `port`; 0 takes any.
///
/// # Errors
/// If the keys make no sense, other machines would get in without one, or the port is in use.
pub fn open(args: &HttpArgs, port: u16) -> Result<Front, Failure> {
    let keys = api_keys(args)?;
    if !args.bind.is_loopback() && keys.is_empty() {
        return Err(Failure::usage(format!(
            "--bind {} lets other machines in; give --api-key or --api-key-file as well",
            args.bind
        )));
    }
    let address = SocketAddr::new(args.bind, port);
    let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            Failure::run(format!("port {port} is in use; choose another with --port, or 0 for any"))
        }
        _ => Failure::run(format!("the endpoint cannot listen on {address}: {error}")),
    })?;
    Ok(Front { listener, options: ApiOptions { keys, host_names: args.host_name.clone(), ..ApiOptions::default() } })
}

/// Keys from the command line and the file.
fn api_keys(args: &HttpArgs) -> Result<Vec<String>, Failure> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = files::read_text(path, MAX_KEY_FILE_BYTES)
            .map_err(|error| Failure::usage(format!("--api-key-file {error}")))?;
        let found = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let before = keys.len();
        keys.extend(found.map(str::to_owned));
        if keys.len() == before {
            let path = path.display();
            return Err(Failure::usage(format!("--api-key-file {path}: there is no key in it; write one per line")));
        }
    }
    if keys.iter().any(|key| key.trim().is_empty()) {
        return Err(Failure::usage("--api-key must not be empty"));
    }
    Ok(keys)
}
