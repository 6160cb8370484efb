"""What a checkup trains, repairs and judges."""
