// How often a text repeats itself: counts of its n-grams, exact and in one walk over growing n.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpt {

// Numbers distinct keys and counts them: open addressing, a key's number is its slot.
class KeyCounter {
 public:
  void reset(std::size_t most_keys) {
    bits_ = 4;
    while ((std::size_t{1} << bits_) < 2 * most_keys) ++bits_;
    slots_.assign(std::size_t{1} << bits_, Slot{0, 0});
  }

  // Counts `key` and returns its slot.
  std::uint32_t add(std::uint64_t key) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = ((key ^ (key >> 31)) * 0x9e3779b97f4a7c15ULL) >> (64 - bits_);
    while (slots_[at].key != key && slots_[at].count) at = (at + 1) & mask;
    slots_[at].key = key;
    ++slots_[at].count;
    return static_cast<std::uint32_t>(at);
  }

  std::uint32_t count(std::uint32_t slot) const { return slots_[slot].count; }

 private:
  struct Slot {
    std::uint64_t key;
    std::uint32_t count;
  };

  std::vector<Slot> slots_;
  unsigned bits_ = 4;
};

// Walks n = 2, 3, ... over a sequence of symbols below 2^21 (code points, or numbers of words). An n-gram
// is named by the slot of its first n-1 symbols and the last one, so names are exact; where the first n-1
// occur once, so does every longer one that begins there, and the place is left out from then on.
class NgramWalk {
 public:
  // Longer sequences are judged by this much of their beginning, so that names have 21 bits, counts 22,
  // and the table at most 16 MiB.
  static constexpr std::size_t kLongest = std::size_t{1} << 20;

  struct Level {
    std::size_t total = 0;     // n-grams
    std::size_t distinct = 0;  // different ones
    std::size_t repeated = 0;  // different ones that occur more than once
    std::size_t most = 0;      // occurrences of the commonest
  };

  struct Place {
    std::uint32_t at;
    std::uint32_t name;
  };

  // Symbols must live as long as the walk.
  void begin(const std::uint32_t* symbols, std::size_t size) {
    symbols_ = symbols;
    size_ = std::min(size, kLongest);
    n_ = 1;
    places_.resize(size_);
    for (std::size_t at = 0; at < size_; ++at) places_[at] = {static_cast<std::uint32_t>(at), symbols[at]};
  }

  // The next n. Afterwards `repeats` are the places, ascending, whose n-gram occurs more than once.
  Level next() {
    ++n_;
    Level level;
    level.total = size_ >= n_ ? size_ - n_ + 1 : 0;
    while (!places_.empty() && places_.back().at >= level.total) places_.pop_back();
    level.distinct = level.total - places_.size();  // those left out before occur once
    level.most = level.total ? 1 : 0;
    clear_table();
    for (Place& place : places_) {
      place.name = add(std::uint64_t{place.name} << 21 | symbols_[place.at + n_ - 1]);
      const std::size_t count = this->count(place);
      level.distinct += count == 1;
      level.repeated += count == 2;
      level.most = std::max(level.most, count);
    }
    keep_repeats();
    return level;
  }

  const std::vector<Place>& repeats() const { return places_; }
  std::size_t count(const Place& place) const { return slots_[place.name] & kCountMask; }
  std::size_t n() const { return n_; }

 private:
  // A slot is key << kCountBits | count: 42 bits and 22.
  static constexpr unsigned kCountBits = 22;
  static constexpr std::uint64_t kCountMask = (std::uint64_t{1} << kCountBits) - 1;

  void clear_table() {
    bits_ = 4;
    while ((std::size_t{1} << bits_) < 2 * places_.size()) ++bits_;
    slots_.assign(std::size_t{1} << bits_, 0);
  }

  std::uint32_t add(std::uint64_t key) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = ((key ^ key >> 21) * 0x9e3779b97f4a7c15ULL) >> (64 - bits_);
    while (slots_[at] != 0 && slots_[at] >> kCountBits != key) at = (at + 1) & mask;
    slots_[at] = (slots_[at] ? slots_[at] : key << kCountBits) + 1;
    return static_cast<std::uint32_t>(at);
  }

  void keep_repeats() {  // without a branch: which place repeats cannot be guessed
    std::size_t kept = 0;
    for (std::size_t k = 0; k < places_.size(); ++k) {
      const Place place = places_[k];
      places_[kept] = place;
      kept += count(place) > 1;
    }
    places_.resize(kept);
  }

  const std::uint32_t* symbols_ = nullptr;
  std::size_t size_ = 0;
  std::size_t n_ = 1;
  std::vector<Place> places_;
  std::vector<std::uint64_t> slots_;
  unsigned bits_ = 4;
};

}  // namespace cpt
