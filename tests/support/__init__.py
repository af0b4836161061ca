"""What the tests share: helpers, small federations and the scripts that run under mpirun."""
