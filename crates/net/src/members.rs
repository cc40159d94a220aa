//! The nodes that a coordinator has admitted, in `<state-dir>/members.json`.
//!
//! A member may come back without a ticket: its key is its admission, until it is forgotten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use brigade_base::NodeId;
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, read_json, write_json};

const FILE: &str = "members.json";

/// Most members. Far beyond what one coordinator places a model on; bounds the file against a leaked ticket.
pub const MAX_MEMBERS: usize = 4096;

/// Longest `members.json` that is read: an entry has at most 64 characters of name (256 bytes) and 200 bytes besides,
/// so 4096 of them stay below 2 MiB.
const MAX_FILE: u64 = 2 << 20;

/// Longest name that is kept, in characters; what the longest host name label has.
const MAX_NAME: usize = 64;

/// Who may open links without a ticket. Every change is on disk when the method returns.
#[derive(Debug)]
pub struct Members {
    path: PathBuf,
    members: BTreeMap<NodeId, Member>,
}

/// An admitted node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub node: NodeId,
    /// What it calls itself, without control characters and at most 64 characters; proves nothing.
    pub name: String,
    /// When it was first admitted, in seconds since 1970.
    pub admitted_unix_s: u64,
}

/// Why a node was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum MembersError {
    /// There are too many.
    #[error("{MAX_MEMBERS} nodes are members already; forget some that no longer come")]
    Full,
    /// The list could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How the list looks on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembersFile {
    members: Vec<MemberFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberFile {
    node: String,
    name: String,
    admitted_unix_s: u64,
}

impl Members {
    /// Opens the list in `dir`; empty if there is none yet.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        let Some(file) = read_json::<MembersFile>(&path, MAX_FILE)? else {
            return Ok(Self { path, members: BTreeMap::new() });
        };
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason };
        if file.members.len() > MAX_MEMBERS {
            return Err(damaged("it has too many members".to_owned()));
        }
        let mut members = BTreeMap::new();
        for MemberFile { node, name, admitted_unix_s } in file.members {
            let node = node.parse().map_err(|error| damaged(format!("{node:?} is no node: {error}")))?;
            members.insert(node, Member { node, name: plain_name(&name), admitted_unix_s });
        }
        Ok(Self { path, members })
    }

    /// Whether the node was admitted.
    pub fn contains(&self, node: &NodeId) -> bool {
        self.members.contains_key(node)
    }

    /// The members in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Admits a node, or takes over the new name of a member. True if it was no member before.
    ///
    /// # Errors
    /// If there are too many, or it could not be stored; then nothing has changed.
    pub fn admit(&mut self, node: NodeId, name: &str, now_unix_s: u64) -> Result<bool, MembersError> {
        let name = plain_name(name);
        let known = self.members.get(&node);
        if known.is_some_and(|member| member.name == name) {
            return Ok(false);
        }
        if known.is_none() && self.members.len() >= MAX_MEMBERS {
            return Err(MembersError::Full);
        }
        let admitted_unix_s = known.map_or(now_unix_s, |member| member.admitted_unix_s);
        let mut members = self.members.clone();
        let is_new = members.insert(node, Member { node, name, admitted_unix_s }).is_none();
        self.commit(members)?;
        Ok(is_new)
    }

    /// Takes a node from the list: it needs a ticket to come back. False if it was no member.
    ///
    /// # Errors
    /// If it could not be stored; then nothing has changed.
    pub fn forget(&mut self, node: &NodeId) -> Result<bool, StoreError> {
        let mut members = self.members.clone();
        if members.remove(node).is_none() {
            return Ok(false);
        }
        self.commit(members)?;
        Ok(true)
    }

    fn commit(&mut self, members: BTreeMap<NodeId, Member>) -> Result<(), StoreError> {
        let entry = |member: &Member| MemberFile {
            node: member.node.to_string(),
            name: member.name.clone(),
            admitted_unix_s: member.admitted_unix_s,
        };
        write_json(&self.path, &MembersFile { members: members.values().map(entry).collect() })?;
        self.members = members;
        Ok(())
    }
}

/// A name that can go to a terminal and a file.
fn plain_name(name: &str) -> String {
    name.trim().chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn node(n: u16) -> NodeId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&n.to_be_bytes());
        NodeId::from_bytes(bytes)
    }

    #[test]
    fn members_are_remembered_until_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut members = Members::open(dir.path()).unwrap();
        assert!(members.admit(node(1), "attic", 100).unwrap());
        assert!(members.admit(node(2), "cellar", 200).unwrap());
        assert!(!members.admit(node(1), "loft", 300).unwrap());
        let mut members = Members::open(dir.path()).unwrap();
        let list: Vec<_> = members.iter().map(|member| (member.name.as_str(), member.admitted_unix_s)).collect();
        assert_eq!(list, [("loft", 100), ("cellar", 200)]);
        assert!(members.forget(&node(1)).unwrap());
        assert!(!members.forget(&node(1)).unwrap());
        let members = Members::open(dir.path()).unwrap();
        assert!(!members.contains(&node(1)) && members.contains(&node(2)));
    }

    #[test]
    fn a_name_is_cut_and_cleaned() {
        let dir = tempfile::tempdir().unwrap();
        let mut members = Members::open(dir.path()).unwrap();
        members.admit(node(1), &format!(" \u{1b}[31m{}\n", "é".repeat(200)), 1).unwrap();
        let name = members.iter().next().unwrap().name.clone();
        assert!(name.starts_with("[31mé") && name.chars().count() == MAX_NAME);
    }

    #[test]
    fn the_longest_list_can_be_read_again_and_grows_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let mut members = Members::open(dir.path()).unwrap();
        let member = |n| Member { node: node(n), name: "\u{10ffff}".repeat(MAX_NAME), admitted_unix_s: u64::MAX };
        members.commit((0..MAX_MEMBERS as u16).map(|n| (node(n), member(n))).collect()).unwrap();
        let mut members = Members::open(dir.path()).unwrap();
        assert!(matches!(members.admit(node(u16::MAX), "one more", 1), Err(MembersError::Full)));
        assert!(!members.admit(node(0), "renamed", 1).unwrap());
    }

    #[test]
    fn a_damaged_list_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(&path, r#"{"members":[{"node":"12","name":"x","admitted_unix_s":1}]}"#).unwrap();
        let message = Members::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("members.json is damaged") && path.exists(), "{message}");
    }
}
