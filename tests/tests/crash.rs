//! Training that is killed or asked to stop ends with the bits of a run that nobody disturbed.
//!
//! `cargo xtask crash --kills 200 --signals 50` is the long form.

/// Rows C1, C6, C7 and C8 of the table of promises.
#[cfg(unix)]
#[test]
fn twenty_kills_and_ten_signals_change_no_byte() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_crash"))
        .args(["--kills", "20", "--signals", "10"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{said}");
    assert!(output.status.success(), "{said}{complaint}");
    for line in ["crash: 20 kills, 20 bit-exact", "signals: 10 of 10"] {
        assert!(said.contains(line), "no `{line}` in: {said}");
    }
}
