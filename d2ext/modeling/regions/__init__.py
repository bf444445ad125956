"""What happens to regions, whatever the scheme: sampling, targets, losses, and moving boxes."""
