"""What only a GPU can show, in parts of some minutes: `dora-parity gpu` (`make gpu`) runs them into one file.

Each part is a module whose `findings(device)` yields what it found; on a CPU all of them run as well, which is their
test.

    suite   the suite's torch ranks on the device: world 1, and world 2 where there are two
    codec   bitsandbytes' own kernels against the profile that describes them (Q5), and its decoder (Q4)
    jax     the reference compiled for the device, against its own float64 on the host
    bench   training steps, timed by the device's events
"""
