"""What EKFAC asks of kronfluence: its calls, and the layers, rows and eigenbases that they work on."""
