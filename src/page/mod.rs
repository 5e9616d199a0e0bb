//! The status page. All of its files are made from one snapshot of the state.
//!
//! `reader` asks Postgres, and `server` answers browsers. Everything between them is pure: it makes files from a [`Snapshot`], the
//! [`Options`] and the time. The same files are served from memory and written by `--out`.

pub mod badge;
pub mod feed;
pub mod html;
pub mod json;
pub mod reader;
pub mod server;
pub mod snapshot;
pub mod view;
pub mod words;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use bytes::Bytes;

use crate::hash::fnv1a;
use crate::page::snapshot::Snapshot;
use crate::page::view::{Options, View};

/// One file of the page.
#[derive(Debug)]
pub struct File {
    pub content_type: &'static str,
    pub body: Bytes,
    /// Compressed at the first request for it.
    gzipped: OnceLock<Bytes>,
    /// The entity tag. It is weak, because the compressed form has the same one.
    pub tag: String,
}

/// All files, by their path without the first slash: `index.html`, `host/KEY/index.html`, …
pub type Files = BTreeMap<String, File>;

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const SVG: &str = "image/svg+xml";

/// Makes all of the files. `now` only decides whether the page says that the snapshot is old.
pub fn render(snapshot: &Snapshot, options: &Options, now: i64) -> Files {
    let view = View::new(snapshot, options, now);
    let mut files = Files::new();
    let mut add = |path: String, content_type, body: String| {
        files.insert(path, File::new(content_type, body));
    };
    add("index.html".into(), HTML, html::overview::render(&view));
    for (path, text) in html::incidents::render(&view) {
        add(path, HTML, text);
    }
    for shown in &view.hosts {
        let key = &shown.key;
        add(
            format!("host/{key}/index.html"),
            HTML,
            html::host::render(&view, shown),
        );
        add(format!("badge/{key}.svg"), SVG, badge::svg(shown));
        add(format!("badge/{key}.json"), JSON, badge::json(shown));
    }
    add(
        "feed.atom".into(),
        "application/atom+xml; charset=utf-8",
        feed::render(&view),
    );
    add("status.json".into(), JSON, json::render(&view));
    add("icon.svg".into(), SVG, badge::icon(view.state()));
    add(
        "style.css".into(),
        "text/css; charset=utf-8",
        include_str!("style.css").into(),
    );
    add(
        "refresh.js".into(),
        "text/javascript; charset=utf-8",
        include_str!("refresh.js").into(),
    );
    files
}

impl File {
    fn new(content_type: &'static str, body: String) -> Self {
        let tag = format!("W/\"{:016x}\"", fnv1a(body.bytes().chain(content_type.bytes())));
        Self {
            content_type,
            body: body.into(),
            gzipped: OnceLock::new(),
            tag,
        }
    }

    pub fn gzipped(&self) -> Bytes {
        use std::io::Write as _;
        let gzip = || {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            // Writing to memory cannot fail.
            let _ = encoder.write_all(&self.body);
            encoder.finish().unwrap_or_default().into()
        };
        self.gzipped.get_or_init(gzip).clone()
    }
}

#[cfg(test)]
mod tests;
