//! Response heads with more lines than ureq's parser takes (128, whatever their size).
//!
//! Such a head is held back until it is complete, and thinned to the lines that a check reads. Pure.

use super::chunks::{HIDDEN_CONTENT_LENGTH, HIDDEN_TRANSFER_ENCODING};

/// Heads up to this many lines go to ureq as they come, so that what is no HTTP at all is seen at once.
const MAX_LINES: usize = 100;

/// Every header that ureq or the check looks at.
const READ: [&str; 8] = [
    HIDDEN_CONTENT_LENGTH,
    HIDDEN_TRANSFER_ENCODING,
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "location",
    "transfer-encoding",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// Few enough lines for ureq, complete or not.
    Fits,
    /// Too many lines, and not at its end yet.
    Unfinished,
    /// Too many lines, this many bytes.
    Whole(usize),
}

/// What the head at the start of `input` is.
pub(super) fn look(input: &[u8]) -> Head {
    // Nearly always; cheap next to looking for the lines.
    if line_ends(input) <= MAX_LINES {
        return Head::Fits;
    }
    let mut bytes = 0;
    for (number, line) in input.split_inclusive(|byte| *byte == b'\n').enumerate() {
        bytes += line.len();
        if number > 0 && matches!(line, b"\n" | b"\r\n") {
            return if number <= MAX_LINES {
                Head::Fits
            } else {
                Head::Whole(bytes)
            };
        }
    }
    Head::Unfinished
}

/// Every answered check passes through here with all that was read: in pieces whose count fits a byte, which compilers
/// turn into vector instructions.
fn line_ends(input: &[u8]) -> usize {
    let in_piece = |piece: &[u8]| piece.iter().map(|byte| u8::from(*byte == b'\n')).sum::<u8>();
    input.chunks(255).map(|piece| usize::from(in_piece(piece))).sum()
}

/// A whole head with only the lines that are read.
pub(super) fn thinned(head: &[u8]) -> Vec<u8> {
    let mut thin = Vec::new();
    let mut keep = true;
    for (number, line) in head.split_inclusive(|byte| *byte == b'\n').enumerate() {
        keep = match line {
            _ if number == 0 => true,
            b"\n" | b"\r\n" => true,
            // A folded line belongs to the one before it.
            [b' ' | b'\t', ..] => keep,
            _ => is_read(line),
        };
        if keep {
            thin.extend_from_slice(line);
        }
    }
    thin
}

fn is_read(line: &[u8]) -> bool {
    let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
    READ.iter().any(|read| name.eq_ignore_ascii_case(read.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: usize) -> Vec<u8> {
        let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
        for number in 1..lines {
            head.extend(format!("X-{number}: a\r\n").bytes());
        }
        head.extend(b"\r\n");
        head
    }

    #[test]
    fn a_head_of_usual_size_is_left_to_ureq_whatever_follows_it() {
        assert_eq!(look(b""), Head::Fits);
        assert_eq!(look(&head(MAX_LINES)), Head::Fits);
        let body = vec![b'\n'; 10_000];
        assert_eq!(look(&[head(10), body].concat()), Head::Fits);
    }

    #[test]
    fn a_longer_one_is_unfinished_until_its_blank_line() {
        let whole = head(MAX_LINES + 1);
        assert_eq!(look(&whole), Head::Whole(whole.len()));
        assert_eq!(
            look(&[whole.clone(), b"body\n\n".to_vec()].concat()),
            Head::Whole(whole.len())
        );
        assert_eq!(look(&whole[..whole.len() - 2]), Head::Unfinished);
    }

    #[test]
    fn thinning_keeps_what_is_read_and_the_shape() {
        let head = b"HTTP/1.1 302 Found\r\nX-A: b\r\n folded\r\nLOCATION: /a:b\r\n\tfolded\r\nContent-Lengths: 7\r\n\
            content-length: 5\r\n\r\n";
        let thin = b"HTTP/1.1 302 Found\r\nLOCATION: /a:b\r\n\tfolded\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(thinned(head), thin);
    }
}
