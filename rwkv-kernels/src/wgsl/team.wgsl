// Equal parts of a workgroup.

struct Team {
    index: u32, // of the team
    count: u32, // of teams
    lane: u32,  // of the invocation in its team
    size: u32,  // invocations of a team
}
