"""Building blocks of networks: backbones, frozen weights, class weights, schedules."""
