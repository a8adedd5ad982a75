"""Students: opened, cut, adapted, saved. They know no teacher."""
