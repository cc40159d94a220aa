//! What goes wrong, and how it is mended.

use super::{Event, Undo, World};
use crate::host::Happening;
use crate::network::{Nanos, NodeIdx, Purpose, SECOND, Stop};

impl World {
    /// Draws a fault, and when it ends and the next one comes.
    pub(super) fn trouble(&mut self) {
        if self.is_mended {
            return;
        }
        let faults = self.scenario.faults;
        let next = self.now + 1 + self.random.below(2 * faults.pause);
        self.at(next, Event::Trouble);
        let kinds = [
            ("kill", faults.kill),
            ("vanish", faults.vanish),
            ("freeze", faults.freeze),
            ("partition", faults.partition),
            ("link", faults.link),
            ("slow", faults.slow),
            ("disk", faults.disk),
            ("leave", faults.leave),
        ];
        let mut drawn = self.random.below(100);
        let Some((kind, _)) = kinds.into_iter().find(|(_, share)| {
            let is_it = drawn < *share;
            drawn = drawn.saturating_sub(*share);
            is_it
        }) else {
            return;
        };
        *self.report.faults.entry(kind).or_default() += 1;
        self.go_wrong(kind);
    }

    fn go_wrong(&mut self, kind: &'static str) {
        let n_nodes = self.nodes.len() as u64;
        let any = self.random.below(n_nodes) as usize;
        let worker = 1 + self.random.below(n_nodes - 1) as usize;
        let (short, long) = (self.random.below(3 * SECOND), self.random.below(12 * SECOND));
        let later = self.now + if self.random.percent(70) { short } else { long };
        let victim = if self.scenario.faults.coordinator && any == 0 { 0 } else { worker };
        self.say(|| format!("FAULT {kind} node {victim} until {:.2}", later as f64 / SECOND as f64));
        match kind {
            "kill" | "vanish" => {
                self.stop(victim, if kind == "kill" { Stop::Killed } else { Stop::Vanished });
                self.at(later, Event::Undo(Undo::Start(victim)));
            }
            "freeze" if self.nodes[any].process.is_some() => {
                self.nodes[any].is_frozen = true;
                self.at(later, Event::Undo(Undo::Thaw(any)));
            }
            "partition" => self.partition(later),
            "link" => {
                let mut links = self.network.open_links();
                if self.random.percent(70) {
                    links.retain(|(_, purpose, _)| *purpose == Purpose::Data);
                }
                if !links.is_empty() {
                    let (id, ..) = links[self.random.below(links.len() as u64) as usize];
                    let is_black_hole = self.random.percent(40);
                    self.network.break_link(self.now, id, is_black_hole);
                }
            }
            "slow" => {
                self.nodes[any].slowness = 20;
                self.at(later, Event::Undo(Undo::Hasten(any)));
            }
            "disk" => {
                self.nodes[any].is_disk_full = true;
                self.at(later, Event::Undo(Undo::EmptyDisk(any)));
            }
            _ => {
                let incarnation = self.nodes[worker].incarnation;
                self.take(Event::Node(worker, incarnation, Happening::Leave));
            }
        }
    }

    /// Cuts off some nodes from the others, in one direction or both.
    fn partition(&mut self, until: Nanos) {
        let n_nodes = self.nodes.len();
        let inside: Vec<bool> = (0..n_nodes).map(|_| self.random.percent(40)).collect();
        let is_two_way = self.random.percent(60);
        for from in 0..n_nodes {
            for to in 0..n_nodes {
                if inside[from] && !inside[to] || is_two_way && !inside[from] && inside[to] {
                    self.network.block(self.now, from, to);
                    self.at(until, Event::Undo(Undo::Unblock(from, to)));
                }
            }
        }
    }

    pub(super) fn undo(&mut self, undo: Undo) {
        match undo {
            // Behind the end, all who could coordinate are gone for good.
            Undo::Start(node) if self.is_over && self.scenario.may_lead[node] => {}
            Undo::Start(node) => self.start(node),
            Undo::Thaw(node) => self.thaw(node),
            Undo::Unblock(from, to) => self.network.unblock(self.now, from, to),
            Undo::Hasten(node) => self.nodes[node].slowness = 1,
            Undo::EmptyDisk(node) => self.nodes[node].is_disk_full = false,
        }
    }

    fn thaw(&mut self, node: NodeIdx) {
        let of = &mut self.nodes[node];
        of.is_frozen = false;
        let thaws = std::mem::take(&mut of.thaws);
        thaws.into_iter().for_each(|event| self.take(event));
    }

    pub(super) fn mend(&mut self) {
        self.say(|| "all is mended".to_owned());
        self.is_mended = true;
        self.network.heal(self.now);
        for node in 0..self.nodes.len() {
            self.nodes[node].slowness = 1;
            self.nodes[node].is_disk_full = false;
            self.thaw(node);
            self.start(node);
        }
    }
}
