//! Models that lie elsewhere: found on the hub or the web, downloaded, verified, and kept on disk.
//!
//! - [`ModelSource`] is what people write: a path, `hf:OWNER/REPOSITORY:Q4_K_M`, or an address.
//! - [`Store`] is a directory of models. [`Store::open`] turns a source into a path, and fetches what is missing:
//!   `hub` lists a repository, `choose` says which files are meant, `download` brings each to the disk.
//! - [`RemoteModel`] is a model of which only the header is read, and ranges as somebody wants them. Its
//!   [`RemoteLocation`] may be sent to other nodes, since it holds no secret.
//! - [`Client`] asks servers: with a token the hub alone, again where something breaks off, and believing nothing.
//!   [`Settings`] say which hub, and how patiently.
//!
//! Everything blocks; [`Event`]s tell how far it is. Whoever opens a model holds it ([`Opened`]), and it is not removed
//! meanwhile, nor is it fetched twice at once: folders are locked across processes.

mod choose;
mod client;
mod download;
mod entry;
mod error;
mod files;
mod find;
mod hub;
mod progress;
mod ranges;
mod remote;
mod settings;
mod shelf;
mod source;
mod split;
mod store;
mod tries;
mod url;

pub use choose::{ChoiceError, HubFile, PREFERRED, choose};
pub use client::{Client, content_range};
pub use download::DownloadError;
pub use error::{Access, FetchError};
pub use hub::{Revision, next_page, parse_page, parse_revision};
pub use progress::{Event, Listener};
pub use remote::{RemoteFiles, RemoteLocation, RemoteModel, RemotePart};
pub use settings::{Limits, Settings, SettingsError, Token};
pub use shelf::{Listed, Outcome, Prune, Pruned};
pub use source::{HubSource, ModelSource, Pick, SourceError};
pub use split::MAX_PARTS;
pub use store::{Opened, Store, StoreError};
