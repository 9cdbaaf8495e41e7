"""What only training needs: losses, augmentation, quality, the run's log and snapshots, the database's building."""
