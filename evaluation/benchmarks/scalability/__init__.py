"""Cost as models grow (Table 5)."""
