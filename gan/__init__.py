"""What only training needs: batches, losses, augmentation, quality, a run's folder, the database's making."""
