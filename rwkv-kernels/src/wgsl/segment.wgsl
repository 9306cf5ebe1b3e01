// A sequence's part of a call, where its state may have tokens pending: `time_mix_resident::table` writes it.
//
// The kernel declares `segments`, an array of words.

// In place of a base that is written.
const NONE: u32 = 0xFFFFFFFFu;

const SEGMENT: u32 = 8u; // words

struct Segment {
    first: u32,   // its first row
    rows: u32,
    read: u32,    // base read
    written: u32, // base written, if any
    pending: u32, // entries since the base that is read
    entries: u32, // where their slots are listed
    slots: u32,   // where the slots of its rows are listed
    step: u32,    // tokens read before
}

fn segment_of(index: u32) -> Segment {
    let at = index * SEGMENT;
    return Segment(
        segments[at],
        segments[at + 1u],
        segments[at + 2u],
        segments[at + 3u],
        segments[at + 4u],
        segments[at + 5u],
        segments[at + 6u],
        segments[at + 7u],
    );
}
