// Where an element of four may be held in workgroup memory, so that lanes which read every second, fourth or eighth of
// them meet in no bank.
fn spread(i: u32) -> u32 {
    return i ^ (i / 8u % 8u);
}
